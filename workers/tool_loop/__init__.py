"""Agents: the loop in which a model calls tools until it answers."""

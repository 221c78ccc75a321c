"""Workflows: what clients define, and the durable runs of it."""

"""Workflows: their definitions, and their durable runs."""

"""Namespaces, their limits, and their usage."""

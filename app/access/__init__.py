"""Namespaces, their limits, and what they use."""

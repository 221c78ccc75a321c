"""Signals: what is measured, and how it is kept."""

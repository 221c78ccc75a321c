"""Durations and sizes in the formats that people write."""

"""Schedules: they start runs of workflows at given times, exactly one run for each time."""

"""Schedules: workflows that are run at given times, each time once."""

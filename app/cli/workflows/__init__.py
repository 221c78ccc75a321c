"""Commands for workflows, runs and schedules."""

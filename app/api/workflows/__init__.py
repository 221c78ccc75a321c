"""Resources: workflows, runs, their events and values, schedules."""

"""What workers do for memory: scheduled jobs, and steps."""

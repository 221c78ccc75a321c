"""What workers do for memory: prompts are put together, messages appended, and the scheduled jobs."""

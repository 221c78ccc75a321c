"""What workers do for memory: prompts are put together, turns appended, summaries written; what expires is deleted."""
"""What workers do for memory: scheduled jobs, and steps."""
"""What pools and control workers do for memory."""

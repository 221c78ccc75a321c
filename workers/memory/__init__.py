"""What pools do for conversations: prompts are put together, turns are appended, summaries are written."""

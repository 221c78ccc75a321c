"""Commands for memory."""

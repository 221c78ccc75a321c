"""Summaries of conversations: what the window of a prompt no longer has, in fewer words."""

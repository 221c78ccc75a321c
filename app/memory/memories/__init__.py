"""Memories: facts, preferences, decisions, breakthroughs and patterns that outlast a conversation."""

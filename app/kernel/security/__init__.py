"""Defences: which servers may be called, which requests are answered, secrets, and texts and patterns from outside."""

"""Conversations: what was said, in order, as it was said. The record is in Postgres and never rewritten."""

"""Runs: submission, claims, records, control, and their storage."""

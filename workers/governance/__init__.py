"""Scheduled jobs: how control workers run and record them, and the jobs of governance."""

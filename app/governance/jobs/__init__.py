"""Scheduled jobs of the installation: what runs when, and how its passes ended."""

"""The scheduled jobs of governance."""

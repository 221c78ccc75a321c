"""The commands of trials."""

"""Limits on calls of models and submissions of runs: what holds for whom, and what has been used."""

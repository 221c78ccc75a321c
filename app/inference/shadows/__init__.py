"""Shadows: a share of what a model or a workflow did is done again by a candidate, compared, and shown to nobody."""

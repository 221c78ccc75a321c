"""Footprints: how many bytes a model takes of each device, and how that is known."""

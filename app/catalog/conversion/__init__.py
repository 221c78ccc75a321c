"""Conversion of checkpoints, as Python packages bring them, to GGUF files."""

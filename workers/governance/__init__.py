"""The jobs of governance."""

"""Commands for metrics."""

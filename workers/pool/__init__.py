"""A pool: one process that serves one model."""

"""Celery's extension points: how messages reach a worker, how its threads take tasks, and what beat sends."""

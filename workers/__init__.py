"""Worker programs: the Celery app, its tasks, and the processes that hold a model."""

"""Worker programs: the Celery application, its tasks, the agent of a host, and pools."""

"""What Flower is here beyond Celery's: who may use it, which queues it shows, and what its controls do."""

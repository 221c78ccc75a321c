"""What worker processes tell of their work: metrics for Prometheus, and the figures of models."""

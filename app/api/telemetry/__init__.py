"""Metrics of the installation for Prometheus, and the figures of models."""

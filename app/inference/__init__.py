"""Inference: requests to models, their results, and the demand for models."""

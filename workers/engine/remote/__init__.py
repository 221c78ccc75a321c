"""The remote engine: an OpenAI-compatible server serves the model."""

"""The API of Ollama, as a thin adapter of the calls of models."""

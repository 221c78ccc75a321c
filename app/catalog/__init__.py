"""The model catalogue: entries, sources of model files, GGUF headers, and download."""

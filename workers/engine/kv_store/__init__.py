"""The store of prefixes that left the KV cache: their states in host memory, and in files."""

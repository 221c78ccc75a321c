"""The resources of memory, a module each."""
"""The resources of memory: a module each."""

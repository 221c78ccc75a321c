"""The resources of memory, a module each."""

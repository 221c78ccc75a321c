"""The resources of governance, a module each."""

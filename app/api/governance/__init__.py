"""The resources of governance: what the installation does by itself."""

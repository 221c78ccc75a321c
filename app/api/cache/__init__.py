"""The response cache at the API: answers that are kept, shared while they are computed, counted and purged."""

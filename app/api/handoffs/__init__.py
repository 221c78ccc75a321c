"""The resources of hand-offs, and the addresses at which messages arrive."""

"""Hooks: what looks at requests to models and at their results, and may change, refuse or annotate them."""

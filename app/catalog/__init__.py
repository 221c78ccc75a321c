"""The catalogue: which models there are, where their files come from, and how they arrive."""

"""Commands of hand-offs."""

"""Commands for what models remember."""

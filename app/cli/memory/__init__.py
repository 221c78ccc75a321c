"""Commands for what models remember."""
"""Commands for memory, a module for each resource."""
"""Commands for memory."""

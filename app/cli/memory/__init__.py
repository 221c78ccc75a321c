"""Commands for memory, a module for each resource."""

"""The HTTP interface: each resource is a module; `main` puts them together."""

"""The HTTP API: one module for each resource, and `main`, which assembles the application."""

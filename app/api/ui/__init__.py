"""The dashboard: pages of the API for people."""

"""Hooks on requests to models, as workers call them: shipped ones, entry points in processes of their own, and HTTP."""

"""The workflow language: definitions, their parsing and checks, and the step graph."""

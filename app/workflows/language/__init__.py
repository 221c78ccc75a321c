"""The language of workflows: definitions, their checks, and their graph."""

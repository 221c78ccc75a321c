"""The sections of the settings, each a table of `arriero.toml`."""

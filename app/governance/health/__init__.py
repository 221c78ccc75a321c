"""The state of the components of an installation."""

"""The requests and responses of `http` steps."""

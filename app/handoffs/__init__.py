"""Hand-offs: messages that arrive in one protocol and are given to another."""

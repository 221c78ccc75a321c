"""The calls of `http` steps and their answers."""

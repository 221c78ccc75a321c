"""Benchmarks: each a command that prints a table and writes JSON, its peer measured in the same run."""

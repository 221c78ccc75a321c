"""Prompt assembly: which parts of what is known go into a prompt of a limited number of tokens."""

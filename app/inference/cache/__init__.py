"""The response cache: which answers are kept, under which key, and where."""

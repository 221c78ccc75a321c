"""The commands `chat` and `generate`: a model answers at the terminal."""

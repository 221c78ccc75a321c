"""How a model is served beyond its file: by a server, under other names, after other models."""

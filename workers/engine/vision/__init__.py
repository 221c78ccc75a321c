"""Images: the projector that encodes them, and their place in the prompts and decodes of the engine."""

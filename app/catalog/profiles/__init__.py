"""What is known of the families of models that people run: how they call tools, think, end a turn and are sampled."""

"""Memory footprints: the bytes that a model needs on each device: measured, by dry run, or in closed form."""

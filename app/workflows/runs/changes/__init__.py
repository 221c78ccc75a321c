"""Changes: a run under its lock, the events that are applied to it, and the effects of the commit."""

"""Templates (Jinja), conditions (CEL) and transforms over the data of a run."""

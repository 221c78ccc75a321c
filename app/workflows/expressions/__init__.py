"""Templates (Jinja), CEL expressions and JMESPath transforms over the data of a run."""

"""Splits: a share of the calls of a model, or of the runs of a workflow, goes to a candidate, and both are compared."""

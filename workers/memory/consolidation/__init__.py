"""Consolidation in the control worker: the job, and the process that clusters."""

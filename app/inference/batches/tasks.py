"""The task names of the jobs of batches."""

from __future__ import annotations

#: Validates batches, expires and cancels them, and writes their results.
BATCHES = "workers.batch_jobs.run_batches"

"""The task name of the job of splits."""

from __future__ import annotations

#: Reads the outcomes of splits, ramps up, and rolls back.
SPLITS = "workers.split_jobs.run_splits"

"""The task name of the job of consolidations."""

from __future__ import annotations

#: Starts consolidations that are due, and advances those that have not ended.
CONSOLIDATION = "workers.memory.consolidation.job.run_consolidation"

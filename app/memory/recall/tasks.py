"""The task name of the job of recall."""

from __future__ import annotations

#: Has vectors made of passages that have none.
RECALL = "workers.memory.jobs.run_recall"

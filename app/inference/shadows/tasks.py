"""The task name of the job of shadows."""

from __future__ import annotations

#: Begins and compares the runs of candidates.
SHADOWS = "workers.shadow_jobs.run_shadows"

"""The task name of a pass that an operator requested."""

from __future__ import annotations

#: Runs a job; its arguments are the name of the job and the id of the pass.
RUN_JOB = "workers.governance.passes.run_job"

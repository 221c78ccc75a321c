"""The name of the job of the scaler."""

from __future__ import annotations

#: The task name of `run_scaler`.
SCALER = "workers.governance.scaler.run_scaler"

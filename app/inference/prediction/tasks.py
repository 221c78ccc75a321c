"""The name of the job that learns of ended runs."""

from __future__ import annotations

#: The task name of `run_predictions`.
PREDICTIONS = "workers.governance.predictions.run_predictions"

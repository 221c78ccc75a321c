"""The name of the job that adds up costs."""

from __future__ import annotations

#: The task name of `run_costs`.
COSTS = "workers.governance.costs.run_costs"

"""The job of costs: it adds up what attempts cost, and samples how full budgets are."""

from __future__ import annotations

from collections.abc import Mapping
from zoneinfo import ZoneInfo

from app.governance.costs import budget_store, store
from app.governance.signals import store as signals
from app.governance.signals.sample import Sample, SignalLabels
from app.kernel import clock
from app.kernel.database import Database
from app.kernel.sections.costs import CostSettings
from workers.passes import time_limit
from workers.runtime import Runtime

#: Most seconds of one pass.
_SECONDS = 5.0


def run_costs(runtime: Runtime) -> Mapping[str, object] | None:
    """Add up the costs of attempts that have ended, sample budgets, and remove old sums. Raises Unavailable."""
    database, in_time = runtime.runs.database, time_limit(_SECONDS)
    changed = store.add_up(database, in_time)
    _sample_budgets(database, runtime.settings.costs)
    removed = store.expire(database, clock.now(), in_time)
    return {"sums": changed, "removed": removed} if changed or removed else None


def _sample_budgets(database: Database, settings: CostSettings) -> None:
    """Write the signal `budget_used`: of several budgets with the same labels, the fullest one."""
    with database.work() as work:
        fullest: dict[SignalLabels, float] = {}
        for one in budget_store.standings(work, None, clock.now(), ZoneInfo(settings.timezone)):
            labels = SignalLabels(model=one.budget.model or "", namespace=one.budget.namespace)
            fullest[labels] = max(fullest.get(labels, 0.0), one.used)
        if fullest:
            signals.write(work, (Sample("budget_used", used, labels) for labels, used in fullest.items()))

"""
The gate of budgets: refuses new work of a namespace whose hard budget is used up.

What was spent is read at most once in `FRESH` for each namespace, when there is new work of it. Between two reads, each
accepted work reserves what an attempt cost on the average, so that a burst in one process cannot pass the limit by more
than its work differs from that. What other processes accept in that time, and what is in flight, may come on top.
While the database does not answer, what was read last holds; this is logged.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from decimal import Decimal
from zoneinfo import ZoneInfo

from app.governance.costs import budget as budgets
from app.governance.costs import budget_store
from app.governance.costs.budget import BudgetStanding
from app.kernel import clock, log
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import DatabaseUnreachable
from app.kernel.sections.costs import CostSettings
from app.workflows.runs.submission import Prepared

_log = log.get(__name__)

#: For how long a reading holds.
FRESH = timedelta(seconds=1)
#: Most namespaces that are kept.
_MOST = 10_000


@dataclass(slots=True)
class _Reading:
    """What was read of the budgets of a namespace."""

    at: float
    standings: list[BudgetStanding] = field(default_factory=list)
    #: What was reserved since, by the name of the budget.
    reserved: dict[str, Decimal] = field(default_factory=dict)


class BudgetGate:
    """Knows the budgets of the namespaces for which this process accepts work."""

    def __init__(
        self,
        database: Database,
        settings: Callable[[], CostSettings],
        now: Callable[[], datetime] = clock.now,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database, self._settings, self._now, self._ticks = database, settings, now, ticks
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._known: dict[str, _Reading] = {}

    def is_fresh(self, namespace: str) -> bool:
        """Whether `check` reads nothing now."""
        return self._fresh(namespace) is not None

    def check(
        self,
        namespace: str,
        workflow: str,
        models: Collection[str],
        priority: str,
        work: UnitOfWork | None = None,
    ) -> None:
        """Accept new work, and reserve what it may cost. Raises BudgetUsedUp; nothing is reserved then."""
        known = self._fresh(namespace)
        if known is None:
            # A thread that holds a connection waits for no other one, which may want a connection.
            known = self._read(namespace) if work is None else self._keep(namespace, self._read_with(work, namespace))
        if not known.standings:
            return
        now, currency = self._now(), self._settings().currency
        with self._lock:
            covering = [one for one in known.standings if one.budget.covers(workflow, models)]
            # A budget of the period before is none: the next reading begins a new one.
            covering = [one for one in covering if now < one.resets_at]
            for one in covering:
                budgets.refuse(one, known.reserved.get(one.budget.name, Decimal(0)), priority, currency)
            for one in covering:
                known.reserved[one.budget.name] = known.reserved.get(one.budget.name, Decimal(0)) + one.mean

    def check_run(self, prepared: Prepared, work: UnitOfWork | None = None) -> None:
        """Accept a run, as `check` does; `work` is the unit of work of a caller that has one."""
        run = prepared.run
        models = frozenset(step["model"] for step in prepared.steps if step["model"] is not None)
        self.check(str(run["namespace"]), str(run["workflow"]), models, str(run["priority"]), work)

    def _fresh(self, namespace: str) -> _Reading | None:
        known = self._known.get(namespace)
        return known if known is not None and self._ticks() - known.at < FRESH.total_seconds() else None

    def _read(self, namespace: str) -> _Reading:
        with self._reading:
            if (known := self._fresh(namespace)) is not None:  # another thread has read it meanwhile
                return known
            try:
                with self._database.work() as work:
                    made = self._read_with(work, namespace)
            except DatabaseUnreachable as error:
                _log.warning("budgets_not_read", namespace=namespace, error=str(error))
                before = self._known.get(namespace)
                made = _Reading(self._ticks()) if before is None else replace(before, at=self._ticks())
            return self._keep(namespace, made)

    def _read_with(self, work: UnitOfWork, namespace: str) -> _Reading:
        at, zone = self._ticks(), ZoneInfo(self._settings().timezone)
        return _Reading(at, budget_store.standings(work, namespace, self._now(), zone))

    def _keep(self, namespace: str, made: _Reading) -> _Reading:
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[namespace] = made
        return made

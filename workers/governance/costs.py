"""The job of costs: it adds up what attempts cost."""

from __future__ import annotations

from collections.abc import Mapping

from app.governance.costs import store
from app.kernel import clock
from workers.passes import time_limit
from workers.runtime import Runtime

#: Most seconds of one pass.
_SECONDS = 5.0


def run_costs(runtime: Runtime) -> Mapping[str, object] | None:
    """Add up the costs of attempts that have ended, and remove old sums. Raises Unavailable."""
    database, in_time = runtime.runs.database, time_limit(_SECONDS)
    changed = store.add_up(database, in_time)
    removed = store.expire(database, clock.now(), in_time)
    return {"sums": changed, "removed": removed} if changed or removed else None

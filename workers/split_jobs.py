"""The job of splits: what their runs have come to, and what follows."""

from __future__ import annotations

from collections.abc import Mapping

from app.governance.signals import store as signals
from app.governance.signals.sample import Sample, SignalLabels
from app.inference.splits.rows import SplitState
from app.inference.splits.service import Splits
from app.kernel import log
from app.kernel.live import notices
from app.kernel.live.notices import ChangeTopic
from workers.passes import in_turn
from workers.runtime import Runtime

_log = log.get(__name__)


def run_splits(runtime: Runtime) -> Mapping[str, object] | None:
    """Read outcomes, ramp up and end splits: see `app.inference.splits.service`. Raises Unavailable."""
    database = runtime.runs.database
    with in_turn():
        done = Splits(database, lambda: runtime.catalog).advance()
    if done.changes_assignments and runtime.broker is not None:
        notices.send(runtime.broker, ChangeTopic.SPLITS)
    rolled_back = [one for one in done.ended if one.state is SplitState.ROLLED_BACK]
    for one in done.ended:
        _log.warning("split_ended", split=one.name, state=one.state, reason=one.reason)
    if rolled_back:
        with database.work() as work:
            signals.write(
                work, [Sample("split_rollbacks", 1.0, SignalLabels(model=one.model or "")) for one in rolled_back]
            )
    if not done.outcomes and not done.changes_assignments:
        return None
    return {"outcomes": done.outcomes, "ramped": list(done.ramped), "ended": [one.name for one in done.ended]}

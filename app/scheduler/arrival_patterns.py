"""
Arrival patterns as they are stored: read with the cluster, and written by the worker that reconciles.

A pattern is brought up to date with the last request of its model each time that it is read. It is written when a gap
has ended, and else at most once in `_PAUSE`: so long a gap may be counted too long. A restart loses nothing else.
The rows are as many as the models of the catalogue. A row with invalid values is logged and replaced.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime

import psycopg
from sqlalchemy import text

from app.kernel.database import UnitOfWork
from app.kernel.errors import DatabaseUnreachable
from app.kernel.loop_guard import LoopGuard
from app.kernel.priority import Priority
from app.scheduler.planner.arrivals import BURST, KEPT_GAPS, ArrivalPattern

#: A row with invalid values is left out; the others are read.
_GUARD = LoopGuard(psycopg.Error, DatabaseUnreachable)
#: A pattern without a new gap is written once in that time.
_PAUSE = BURST / 2

_READ = text("SELECT model, last_at, priority, gaps FROM arrival_pattern")
_WRITE = text("""
    INSERT INTO arrival_pattern (model, last_at, priority, gaps)
    VALUES (:model, :last, :priority, CAST(:gaps AS jsonb))
    ON CONFLICT (model) DO UPDATE SET last_at = :last, priority = :priority, gaps = CAST(:gaps AS jsonb)
""")
_DELETE_OTHERS = text("DELETE FROM arrival_pattern WHERE model <> ALL(:models)")


@dataclass(frozen=True, slots=True)
class LastRequest:
    """The last request of a model in the window of the arrival rate."""

    at: datetime
    priority: Priority


@dataclass(frozen=True, slots=True)
class StoredPatterns:
    """The patterns by name of the model, as stored, and as they are with the last requests."""

    stored: Mapping[str, ArrivalPattern]
    current: Mapping[str, ArrivalPattern]


def read(work: UnitOfWork, models: Collection[str], last: Mapping[str, LastRequest]) -> StoredPatterns:
    """The patterns of these models, up to date with their last requests. Changes nothing."""
    stored = {}
    for row in work.rows(_READ):
        with _GUARD.item("arrival pattern", row.model):
            gaps = tuple(float(gap) for gap in row.gaps[-KEPT_GAPS:])
            if not all(0 < gap < math.inf for gap in gaps):
                raise ValueError(f"the gaps {gaps} are no numbers of seconds")
            stored[row.model] = ArrivalPattern(row.last_at, Priority(row.priority), gaps)
    current = {model: pattern for model, pattern in stored.items() if model in models}
    for model in last.keys() & set(models):
        at, priority = last[model].at, last[model].priority
        current[model] = current[model].after(at, priority) if model in current else ArrivalPattern(at, priority)
    return StoredPatterns(stored, current)


def write(work: UnitOfWork, patterns: StoredPatterns) -> None:
    """Write the patterns that have changed, and delete those of models that are no more in the catalogue."""
    for model, pattern in sorted(patterns.current.items()):
        before = patterns.stored.get(model)
        if before is None or before.gaps != pattern.gaps or pattern.last - before.last >= _PAUSE:
            values = {"model": model, "last": pattern.last, "priority": str(pattern.priority)}
            work.run(_WRITE, values | {"gaps": json.dumps(pattern.gaps)})
    if patterns.stored.keys() - patterns.current.keys():
        work.run(_DELETE_OTHERS, {"models": sorted(patterns.current)})

"""
What can be done with consolidations: begin one, look, cancel, and choose how often a namespace has one.

Everything is bound to a namespace; consolidations of another one are not found. `None` as a namespace means any.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from uuid import UUID

from app.files.file import parsed_id
from app.kernel import ids
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import Conflict, InvalidInput, NotFound, Problem
from app.kernel.sections.consolidation import ConsolidationSettings
from app.kernel.security import texts
from app.memory.consolidation import store, turns
from app.memory.consolidation.consolidation import (
    FINAL_CONSOLIDATIONS,
    PREFIX,
    SHORTEST_INTERVAL,
    Consolidation,
    ConsolidationPolicy,
    ConsolidationProgress,
    ConsolidationState,
)
from app.memory.consolidation.store import ConsolidationEnd
from app.workflows.runs.service import Runs

#: Longest interval of a namespace's consolidations.
_LONGEST_INTERVAL = timedelta(days=366)


@dataclass(frozen=True, slots=True)
class BegunConsolidation:
    """The consolidation that answers a request for one."""

    consolidation: Consolidation
    #: False: the namespace had one that has not ended.
    created: bool


def begin(
    database: Database,
    settings: ConsolidationSettings,
    namespace: str,
    requested_by: str,
    *,
    model: str | None = None,
    review_model: str | None = None,
) -> BegunConsolidation:
    """Begin a consolidation of what is new in a namespace; one that has not ended is returned instead."""
    with database.work() as work:
        return begin_in(work, settings, namespace, requested_by, model=model, review_model=review_model)


def begin_in(
    work: UnitOfWork,
    settings: ConsolidationSettings,
    namespace: str,
    requested_by: str,
    *,
    model: str | None = None,
    review_model: str | None = None,
) -> BegunConsolidation:
    """As `begin`, in a transaction of the caller."""
    chosen = store.policy_of(work, namespace)
    first = model or chosen.model or settings.model
    through, horizon = turns.horizon(work, namespace)
    values = {
        "id": ids.new_id(),
        "namespace": namespace,
        "requested_by": texts.storable(requested_by, 200),
        "model": first,
        "review_model": review_model or chosen.review_model or settings.review_model or first,
        "read_after": chosen.read_through,
        "read_through": through,
        "horizon": horizon,
    }
    made = store.insert(work, values)
    if made is not None:
        return BegunConsolidation(made, created=True)
    found = store.open_of(work, namespace)
    if found is None:
        raise Conflict("the consolidation that was in progress has ended at this moment; request another one")
    return BegunConsolidation(found, created=False)


def get(database: Database, shown: str, namespace: str | None) -> tuple[Consolidation, ConsolidationProgress]:
    """Return a consolidation with its progress. Raises NotFound."""
    with database.work() as work:
        found = _require(work, shown, namespace)
        return found, progress_of(work, found)


def page(
    database: Database, namespace: str | None, after: str | None = None, limit: int = 100
) -> tuple[list[tuple[Consolidation, ConsolidationProgress]], bool]:
    """Return consolidations, the newest first, and whether there are more. Raises NotFound."""
    with database.work() as work:
        last = None if after is None else _require(work, after, namespace).id
        found = store.page(work, namespace, last, limit + 1)
        return [(one, progress_of(work, one)) for one in found[:limit]], len(found) > limit


def cancel(runs: Runs, shown: str, namespace: str | None) -> Consolidation:
    """
    Cancel a consolidation. Its turns are read by the next one.

    Raises NotFound, and Conflict when it has ended.
    """
    with runs.database.work() as work:
        found = _require(work, shown, namespace, lock=True)
        if found.state in FINAL_CONSOLIDATIONS:
            raise Conflict(f"{shown} has ended: it {found.state}")
        how = ConsolidationEnd(ConsolidationState.CANCELLED, progress=progress_of(work, found))
        store.end(work, found.id, how)
        cancelled = _require(work, shown, namespace)
    if found.run_id is not None:
        with suppress(NotFound):  # it was removed at this moment
            runs.cancel(found.run_id)
    return cancelled


def policy(database: Database, namespace: str) -> ConsolidationPolicy:
    """Return what a namespace has chosen."""
    with database.work() as work:
        return store.policy_of(work, namespace)


def set_policy(
    database: Database, namespace: str, *, every: timedelta | None, model: str | None, review_model: str | None
) -> ConsolidationPolicy:
    """Choose how often a namespace has its new turns consolidated. Raises InvalidInput."""
    if every is not None and not SHORTEST_INTERVAL <= every <= _LONGEST_INTERVAL:
        raise InvalidInput([Problem("every", "it is too short or too long", "1m to 366d, or null")], "schedule")
    with database.work() as work:
        store.set_policy(work, namespace, every, model, review_model)
        return store.policy_of(work, namespace)


def progress_of(work: UnitOfWork, one: Consolidation) -> ConsolidationProgress:
    """Return how much of a consolidation is done; of one that has ended, what was stored."""
    if one.state in FINAL_CONSOLIDATIONS:
        requests = 2 * one.clusters
        is_done = one.state == ConsolidationState.SUCCEEDED
        return ConsolidationProgress(requests, requests if is_done else 0, one.tokens_in, one.tokens_out, one.cost)
    if one.run_id is None:
        return ConsolidationProgress()
    found = store.progress_of(work, one.run_id)
    # The maps of a run have no items before a worker has begun them.
    return replace(found, requests=max(found.requests, 2 * one.clusters))


def _require(work: UnitOfWork, shown: str, namespace: str | None, *, lock: bool = False) -> Consolidation:
    parsed: UUID | None = parsed_id(shown, PREFIX)
    found = None if parsed is None else store.find(work, parsed, lock=lock)
    if found is None or (namespace is not None and found.namespace != namespace):
        raise NotFound("consolidation", texts.printable(shown, 100))
    return found

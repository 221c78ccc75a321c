"""The pages of what happens now: the overview, and the queues of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from app.access.callers import Caller, KeyScope
from app.api.admin import audit as audit_resource
from app.api.callers import InjectedCaller, ListedNamespace, requires
from app.api.fleet import explanations
from app.api.fleet import fleet as fleet_resource
from app.api.governance import alerts as alerts_resource
from app.api.services import InjectedServices, Services
from app.api.ui import drawing
from app.api.ui.rendering import render
from app.api.workflows import runs as runs_resource
from app.api.workflows.run_documents import RunListed
from app.fleet.pool import PoolState
from app.governance.health import components
from app.inference import queue_lengths, queues, waiting
from app.inference.queue_lengths import ClassLength
from app.inference.waiting import ModelQueue
from app.kernel import clock
from app.kernel.priority import Priority
from app.workflows.runs import views
from app.workflows.state_machine.states import RunState

router = APIRouter(prefix="/ui", include_in_schema=False, dependencies=[requires(KeyScope.READ)])

#: Most models whose waiting is explained on one page, and rows of a list on the overview.
_MODELS, _ROWS = 30, 8


@dataclass(frozen=True, slots=True)
class QueueClass:
    """What waits for a model in one class, and when a new call of that class would begin."""

    name: str
    waiting: int
    oldest: datetime | None
    seconds: float | None


@dataclass(frozen=True, slots=True)
class ModelWaits:
    """The queue of a model, and why it waits."""

    model: str
    running: int
    waiting: int
    classes: Sequence[QueueClass]
    reason: str
    condition: str


@dataclass(frozen=True, slots=True)
class TargetRow:
    """A model that is kept running: how many pools it should have, and has."""

    model: str
    wanted: int
    serving: int
    coming: int
    pinned: bool
    by: str


@router.get("/overview")
def overview(
    request: Request, caller: InjectedCaller, services: InjectedServices, namespace: ListedNamespace
) -> HTMLResponse:
    """Health, running work, targets, alerts, and what changed lately."""

    def runs(*states: RunState) -> Sequence[RunListed]:
        return runs_resource.page(services, namespace, list(states), limit=_ROWS).runs

    demand = views.demand(services.database, namespace)
    sees_fleet = caller.namespace is None
    health = components.read(services.database, services.publisher) if sees_fleet else {}
    return render(
        request,
        caller,
        "overview.html",
        title="Overview",
        health=health,
        fleet=(fleet := fleet_resource.get(services) if sees_fleet else None),
        targets=[] if fleet is None else _targets(fleet),
        waiting=sum(ready for ready, _ in demand.values()),
        running=sum(running for _, running in demand.values()),
        open_runs=runs(RunState.RUNNING, RunState.CANCELLING, RunState.COMPENSATING, RunState.QUEUED),
        failed=runs(RunState.FAILED),
        alerts=alerts_resource.page(services, namespace, limit=_ROWS).alerts,
        changes=_changes(services, caller, namespace),
        now=clock.now(),
        in_words=drawing.in_words,
    )


@router.get("/queues")
def queues_page(
    request: Request, caller: InjectedCaller, services: InjectedServices, namespace: ListedNamespace
) -> HTMLResponse:
    """For each model: what waits and runs, how long the oldest has waited, and when a new call would begin."""
    demand = views.demand(services.database, namespace)
    lengths = queue_lengths.read(services.database, namespace)
    names = sorted(demand, key=lambda name: (-demand[name][0], name))
    models = [model for name in names[:_MODELS] if (model := services.catalog.find(name)) is not None]
    read = queues.read(services.database, models) if models else {}
    rows = [
        _waits(services, caller, name, demand[name], lengths, read.get(name, ModelQueue(name)))
        for name in (model.name for model in models)
    ]
    return render(
        request,
        caller,
        "queues.html",
        title="Queues",
        rows=rows,
        more=max(len(names) - len(rows), 0),
        in_words=drawing.in_words,
    )


def _waits(
    services: Services,
    caller: Caller,
    name: str,
    demand: tuple[int, int],
    lengths: Mapping[tuple[str, str], ClassLength],
    queue: ModelQueue,
) -> ModelWaits:
    classes = []
    for one in Priority:
        length = lengths.get((name, one.value))
        estimate = waiting.estimate(queue, None, one)
        classes.append(
            QueueClass(one.value, length.waiting if length else 0, length.oldest if length else None, estimate.seconds)
        )
    found = explanations.explain(services, caller, name)
    return ModelWaits(name, demand[1], demand[0], classes, found.reason, str(found.condition))


def _targets(fleet: fleet_resource.FleetOut) -> Sequence[TargetRow]:
    rows = []
    for one in fleet.targets:
        of_model = [pool for pool in fleet.pools if pool.model == one.model]
        serving = sum(pool.state is PoolState.SERVING for pool in of_model)
        coming = sum(pool.state in (PoolState.STARTING, PoolState.WAITING) for pool in of_model)
        rows.append(TargetRow(one.model, one.pools, serving, coming, one.pinned, one.by))
    return rows


def _changes(services: Services, caller: Caller, namespace: str | None) -> Sequence[Any]:
    """Return the last changes, for those who may read the audit log."""
    if KeyScope.ADMIN not in caller.scopes:
        return ()
    return audit_resource.page(services, namespace, None, None, None, limit=_ROWS, cursor=None).entries

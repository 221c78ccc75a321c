"""The pages of what happens now: the overview, and the queues of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import HTMLResponse

from app.access.callers import Caller, KeyScope
from app.api.admin import audit as audit_resource
from app.api.callers import InjectedCaller, ListedNamespace, requires
from app.api.fleet import explanations
from app.api.fleet import fleet as fleet_resource
from app.api.fleet.explanations import ExplanationOut
from app.api.governance import alerts as alerts_resource
from app.api.governance import rules as rules_resource
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.api.ui import drawing
from app.api.ui.pages.trends_page import in_words
from app.api.ui.rendering import render
from app.api.workflows import runs as runs_resource
from app.api.workflows.run_documents import RunListed
from app.fleet.pool import PoolState
from app.governance.health import components
from app.governance.rules import check as rule_check
from app.governance.rules.rule import Rule, SignalCondition
from app.governance.rules.service import RuleService
from app.governance.rules.store import INSTALLATION
from app.governance.signals import store as signal_store
from app.governance.signals.names import SIGNALS
from app.governance.signals.store import SignalQuery
from app.inference import queue_lengths, queues, waiting
from app.inference.queue_lengths import ClassLength
from app.inference.waiting import ModelQueue
from app.kernel import clock
from app.kernel.database import UnitOfWork
from app.kernel.priority import Priority
from app.workflows.runs import views
from app.workflows.state_machine.states import RunState

router = ApiRouter(prefix="/ui", include_in_schema=False, dependencies=[requires(KeyScope.READ)])

#: Most models whose waiting is explained on one page, and rows of a list on the overview.
_MODELS, _ROWS = 30, 8
#: What a rule with this operator wants.
_TARGETS = {">": "at most", ">=": "below", "<": "at least", "<=": "above"}
_UNKNOWN = "no model of this name is in the catalogue: its steps wait until there is one, or until they are cancelled"


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


@dataclass(frozen=True, slots=True)
class TargetFigure:
    """A target of a rule, and what is so now: of the worst value of its label."""

    rule: str
    namespace: str
    signal: str
    #: Such as `at most 80 %`.
    target: str
    #: None while nothing is measured.
    actual: str | None
    #: What it is of, such as a host; empty for all together.
    worst: str
    ok: bool


@dataclass(frozen=True, slots=True)
class RecentChange:
    """Something that changed lately: by a person, or a rule that fired or cleared."""

    at: datetime
    by: str
    what: str
    of: str
    link: str


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
        targets=[] if fleet is None else _kept(fleet),
        waiting=sum(ready for ready, _ in demand.values()),
        running=sum(running for _, running in demand.values()),
        open_runs=runs(RunState.RUNNING, RunState.CANCELLING, RunState.COMPENSATING, RunState.QUEUED),
        failed=runs(RunState.FAILED),
        alerts=alerts_resource.page(services, namespace, limit=_ROWS).alerts,
        figures=_figures(services, namespace),
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
    reasons = explanations.explain_all(services, caller, [model.name for model in models]) if models else {}
    rows = [
        _waits(name, demand[name], lengths, read.get(name, ModelQueue(name)), reasons.get(name))
        for name in names[:_MODELS]
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
    name: str,
    demand: tuple[int, int],
    lengths: Mapping[tuple[str, str], ClassLength],
    queue: ModelQueue,
    found: ExplanationOut | None,
) -> ModelWaits:
    """The queue of a model; one without an explanation is not in the catalogue."""
    classes = []
    for one in Priority:
        length = lengths.get((name, one.value))
        seconds = None if found is None else waiting.estimate(queue, None, one).seconds
        classes.append(
            QueueClass(one.value, length.waiting if length else 0, length.oldest if length else None, seconds)
        )
    if found is None:
        return ModelWaits(name, demand[1], demand[0], classes, _UNKNOWN, "unavailable")
    return ModelWaits(name, demand[1], demand[0], classes, found.reason, str(found.condition))


def _kept(fleet: fleet_resource.FleetOut) -> Sequence[TargetRow]:
    rows = []
    for one in fleet.targets:
        of_model = [pool for pool in fleet.pools if pool.model == one.model]
        serving = sum(pool.state is PoolState.SERVING for pool in of_model)
        coming = sum(pool.state in (PoolState.STARTING, PoolState.WAITING) for pool in of_model)
        rows.append(TargetRow(one.model, one.pools, serving, coming, one.pinned, one.by))
    return rows


def _figures(services: Services, namespace: str | None) -> Sequence[TargetFigure]:
    """Return the targets of the rules that are switched on, as far as they compare one signal with a threshold."""
    found: list[TargetFigure] = []
    rules = [view.stored for view in _rules(services, namespace).all(namespace)]
    with services.database.work() as work:
        for stored in rules:
            rule = rule_check.stored(stored.document)
            condition = next((one for one in rule.conditions if isinstance(one, SignalCondition)), None)
            if not stored.enabled or condition is None or condition.operator not in _TARGETS or len(found) == _ROWS:
                continue
            found.append(_figure(work, rule, stored.namespace, condition, namespace))
    return found


def _figure(
    work: UnitOfWork, rule: Rule, owner: str, condition: SignalCondition, namespace: str | None
) -> TargetFigure:
    definition = SIGNALS[condition.signal]
    statistic = condition.statistic or definition.statistics[0]
    where: dict[str, str] = {str(label): value for label, value in condition.scope.items()}
    if namespace is not None and "namespace" in definition.labels:
        where["namespace"] = namespace
    values = signal_store.read(work, SignalQuery(definition.name, condition.window, where, rule.by))
    measured = {
        group: value
        for group, window in values.items()
        if window.observations >= condition.at_least and (value := window.statistic(statistic)) is not None
    }
    above = condition.operator in (">", ">=")
    worst = (max if above else min)(measured, key=measured.__getitem__, default=None)
    threshold = condition.threshold or 0.0
    return TargetFigure(
        rule=rule.rule,
        namespace=owner,
        signal=definition.name,
        target=f"{_TARGETS[str(condition.operator)]} {in_words(threshold, definition.unit)}",
        actual=None if worst is None else in_words(measured[worst], definition.unit),
        worst=worst or "",
        ok=worst is None or not (measured[worst] > threshold if above else measured[worst] < threshold),
    )


def _changes(services: Services, caller: Caller, namespace: str | None) -> Sequence[RecentChange]:
    """Return what changed lately, the newest first: firings, and for those who may read the audit log its entries."""
    found = []
    for one in rules_resource.firings(_rules(services, namespace), namespace, limit=_ROWS).firings:
        link = f"/ui/rules/{quote(one.rule)}" + (f"?namespace={quote(one.namespace)}" if one.namespace else "")
        of = ", ".join(one.labels.values())
        if one.fired_at is not None:
            found.append(RecentChange(one.fired_at, f"rule {one.rule}", "fired", f"{of} {one.reason}".strip(), link))
        if one.fired_at is not None and one.cleared_at is not None:
            found.append(RecentChange(one.cleared_at, f"rule {one.rule}", "cleared", of, link))
    if KeyScope.ADMIN in caller.scopes:
        entries = audit_resource.page(services, namespace, None, None, None, limit=_ROWS, cursor=None).entries
        found += [
            RecentChange(one.at, one.actor, one.action, ", ".join(map(str, one.target.values())), "/ui/audit")
            for one in entries
        ]
    return sorted(found, key=lambda one: one.at, reverse=True)[:_ROWS]


def _rules(services: Services, namespace: str | None) -> RuleService:
    return RuleService(services.database, services.settings.rules.max_rules, namespace or INSTALLATION)

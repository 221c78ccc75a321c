"""
Submission: a client's request for a run, checked and written.

A submission that is sent twice counts once under a key: the client's idempotency key, without a limit of time, or the
workflow's deduplication key, within a window. Two requests are the same when the client sent the same, whatever its
workflow has become since.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.access import namespaces
from app.kernel import ids, log, tracing
from app.kernel.database import UnitOfWork
from app.kernel.errors import (
    ConcurrencyLimitReached,
    Conflict,
    IdempotencyKeyReused,
    InvalidInput,
    Problem,
    StepFailure,
)
from app.kernel.security import texts
from app.workflows.expressions import templates
from app.workflows.language import inputs
from app.workflows.language.definition import ASSIGNED_LABELS, Definition, RoutedDefinition, RouteModels
from app.workflows.language.graph import Graph
from app.workflows.language.steps import FANNED_KINDS
from app.workflows.runs import admission
from app.workflows.runs.changes.change import RunChange, queue_of
from app.workflows.runs.changes.effects import AdmitRuns, CancelRun
from app.workflows.runs.changes.transactions import RunPolicy, RunTransaction
from app.workflows.runs.storage import graphs, history, pauses, payloads, store
from app.workflows.runs.storage.history import HistoryEntry
from app.workflows.runs.storage.payloads import as_json
from app.workflows.state_machine import events
from app.workflows.state_machine.states import RunState

_log = log.get(__name__)

#: The deepest nesting of calls, and the failure of a call beyond that.
MAX_DEPTH = 16
TOO_DEEP = f"workflows call each other more than {MAX_DEPTH} deep"

#: The errors of a run that exceeds a limit.
TOO_MANY = (ConcurrencyLimitReached,)

_DUPLICATE = text("""
    SELECT id FROM run WHERE dedup_key = :key AND created_at > now() - CAST(:window AS interval)
    ORDER BY created_at DESC LIMIT 1
""")


@dataclass(frozen=True, slots=True)
class Submission:
    """A request for a run. A field that is None is as the workflow says."""

    definition: Definition
    inputs: Mapping[str, Any]
    #: The version, for a named workflow.
    version: int | None = None
    priority: str | None = None
    idempotency_key: str | None = None
    rank: int | None = None
    #: In addition to those of the workflow.
    labels: Mapping[str, str] = field(default_factory=dict)
    deadline: timedelta | None = None
    retention: timedelta | None = None
    #: The client named no version, and means the newest.
    newest: bool = False
    #: The id of the run; None for a new one. Another submission with the same id returns the same run.
    id: UUID | None = None
    #: The models that replaced those of the named workflow, as the client sent them.
    models: Mapping[str, str] = field(default_factory=dict)
    #: The namespace of the run; None for that of its label, or else `default`.
    namespace: str | None = None
    #: Its models were chosen already: they are names, and their fallbacks are the caller's business.
    is_routed: bool = False
    #: The trace that it belongs to, as a `traceparent`; None for that of the caller.
    trace_parent: str | None = None
    #: Further labels, which say how it was assigned: the client did not send them.
    assigned: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Accepted:
    """The run that answers a submission."""

    id: UUID
    #: False when the same was submitted before.
    created: bool


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked submission, as rows."""

    id: UUID
    definition: Definition
    inputs: Mapping[str, Any]
    sha256: str
    document: str
    run: Mapping[str, Any]
    #: The inputs as JSON.
    inputs_text: str
    steps: list[dict[str, Any]]
    #: The submission named the id of the run.
    has_given_id: bool = False
    #: How its models were chosen, for its history.
    chosen: Mapping[str, Any] = field(default_factory=dict)


def prepare(
    request: Submission,
    policy: RunPolicy,
    *,
    parent_step_id: UUID | None = None,
    depth: int = 0,
    forked_from: UUID | None = None,
    route: RouteModels | None = None,
    sent: Submission | None = None,
) -> Prepared:
    """
    The rows of a submission. `route` chooses the models of its steps, unless they were chosen already. `sent` is what
    the client sent, where that differs.

    Raises InvalidInput when the inputs break their schemas, a key cannot be rendered or the label `namespace` names
    none, and PayloadTooLarge.
    """
    routed = RoutedDefinition(request.definition)
    if route is not None and not request.is_routed:
        routed = route(request.definition)
    definition = routed.definition
    given = inputs.resolve(definition, request.inputs)
    inputs_text = payloads.encoded(given, policy.limits, "inputs")
    class_, rank = definition.rank()
    priority = request.priority or class_
    rank = request.rank if request.rank is not None else 1 if request.priority else rank
    run_id, sha256 = request.id or ids.new_id(), definition.sha256()
    deadline = request.deadline if request.deadline is not None else definition.deadline
    labels = {**definition.labels, **request.labels}
    for name in labels:
        if name.startswith(ASSIGNED_LABELS):
            reserved = f"labels that begin with {ASSIGNED_LABELS!r} are those of splits"
            raise InvalidInput([Problem(f"labels.{name}", reserved, "any other label")], "run")
    labels |= request.assigned
    namespace = namespace_of(request)
    namespaces.require(namespace, f"labels.{namespaces.LABEL}", "run")
    if namespace != namespaces.DEFAULT or namespaces.LABEL in labels:
        labels[namespaces.LABEL] = namespace
    _require_storable({f"labels.{name}": value for name, value in labels.items()})
    kept = request.retention if request.retention is not None else definition.retention
    concurrency, once = definition.concurrency, definition.deduplicate
    # A called run must answer its own caller, and a fork is wanted in addition to its source.
    is_top_level = parent_step_id is None and forked_from is None
    run = {
        "id": run_id,
        "namespace": namespace,
        "workflow": definition.workflow,
        "version": request.version,
        "sha256": sha256,
        "priority": priority,
        "rank": rank,
        "labels": json.dumps(labels),
        "key": request.idempotency_key,
        "request": fingerprint(sent or request) if request.idempotency_key else None,
        "concurrency_key": concurrency and _key(namespace, definition, concurrency.key, "concurrency.key", given),
        "dedup_key": _key(namespace, definition, once.key, "deduplicate.key", given) if once and is_top_level else None,
        "parent_step_id": parent_step_id,
        "depth": depth,
        "forked_from": forked_from,
        "retention_s": round((kept if kept is not None else policy.retention).total_seconds()),
        "deadline": deadline,
        "trace_parent": request.trace_parent or tracing.current(),
        "expected": None,
    }
    return Prepared(
        run_id,
        definition,
        given,
        sha256,
        as_json(definition.document()),
        run,
        inputs_text,
        _steps(definition),
        request.id is not None,
        routed.chosen,
    )


def create(
    transaction: RunTransaction, prepared: Prepared, fill: Callable[[UUID, UnitOfWork], None] | None = None
) -> Accepted:
    """
    Write a run and begin it, unless it is blocked. `fill` completes its steps before that.

    Returns the earlier run of the same key, if there is one. Raises IdempotencyKeyReused, ConcurrencyLimitReached.
    """
    work = transaction.work
    if prepared.has_given_id and store.exists(work, prepared.id):
        return Accepted(prepared.id, created=False)
    prepared = _without_key_of_caller(work, prepared)
    run, rule = prepared.run, prepared.definition.deduplicate
    if run["dedup_key"] is not None and rule is not None:
        admission.lock(work, run["dedup_key"])
        earlier = work.row(_DUPLICATE, {"key": run["dedup_key"], "window": rule.window})
        if earlier is not None:
            return Accepted(earlier.id, created=False)
    state, superseded = admission.decide(work, prepared.definition, run)
    store.keep_definition(work, prepared.sha256, prepared.document)
    (kept,) = payloads.keep(work, [prepared.inputs_text], transaction.policy.limits)
    pauses.hold_workflow(work, run["namespace"], prepared.definition.workflow)
    if not store.insert_run(work, {**run, **kept.columns("inputs"), "state": state}):
        assert run["key"] is not None
        same = of_key(work, run["namespace"], run["key"], run["request"])
        if same is None:
            raise Conflict(f"the run of idempotency key {run['key']!r} was removed at this moment: submit again")
        return same
    store.insert_steps(work, prepared.id, run["priority"], run["rank"], prepared.steps)
    if fill is not None:
        fill(prepared.id, work)
    _begin(transaction, prepared)
    effects = transaction.effects
    effects.extend(CancelRun(run_id, "a newer run of its concurrency key came") for run_id in superseded)
    if state is RunState.BLOCKED:
        effects.append(AdmitRuns(run["concurrency_key"]))
    return Accepted(prepared.id, created=True)


def _begin(transaction: RunTransaction, prepared: Prepared) -> None:
    locked, steps = store.open_run(transaction.work, prepared.id)
    assert locked is not None, "it was written in this transaction"
    source = prepared.run["forked_from"]
    cause = {"forked_from": str(source)} if source else None
    history.add(transaction.work, HistoryEntry(prepared.id, "submitted", cause))
    chosen = (HistoryEntry(prepared.id, "model_chosen", why, key) for key, why in prepared.chosen.items())
    history.add(transaction.work, *chosen)
    graph = graphs.of(transaction.work, prepared.sha256)
    change = RunChange(transaction, graph, locked, steps, prepared.inputs)
    change.apply(events.RunSubmitted())
    change.write()
    _log.info("run_submitted", run_id=str(locked.id), workflow=locked.workflow, steps=len(steps))


def of_key(work: UnitOfWork, namespace: str, key: str, request: str) -> Accepted | None:
    """
    The run of an idempotency key in a namespace, or None.

    Raises IdempotencyKeyReused when the key came with another request, InvalidInput when it cannot be stored.
    """
    _require_storable({"idempotency_key": key})
    row = store.run_of_key(work, namespace, key)
    if row is not None and row.request_sha256 != request:
        raise IdempotencyKeyReused(key, str(row.id))
    return None if row is None else Accepted(row.id, created=False)


def fingerprint(request: Submission) -> str:
    """The hash of a request as the client sent it. A repeated request has the same hash; any other has another."""
    what = [request.definition.workflow, "newest"] if request.newest else [request.definition.sha256(), request.version]
    spans = [None if span is None else span.total_seconds() for span in (request.deadline, request.retention)]
    content = [what, request.inputs, request.priority, request.rank, request.labels, *spans]
    if request.models:
        content.append(request.models)
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=dict).encode()).hexdigest()


def own_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Return the labels without those that say how a run was assigned, for another run that is made of it."""
    return {name: value for name, value in labels.items() if not name.startswith(ASSIGNED_LABELS)}


def _steps(definition: Definition) -> list[dict[str, Any]]:
    graph = Graph(definition)
    rows = []
    for position, step in enumerate(definition.all_steps()):
        models = () if isinstance(step, FANNED_KINDS) else graph.models(step.id)
        rows.append(
            {
                "id": ids.new_id(),
                "key": step.id,
                "position": position,
                "kind": step.kind,
                "model": models[0] if models else None,
                "queue": queue_of(models),
            }
        )
    return rows


def _require_storable(given: Mapping[str, str]) -> None:
    """Refuse texts that Postgres cannot store: with replaced characters they would be other labels or keys."""
    for where, value in given.items():
        if texts.storable(value) != value:
            message = f"{texts.printable(value, 60)!r} holds NUL, or half a character"
            raise InvalidInput([Problem(where, message, "any other text")], "run")


def namespace_of(request: Submission) -> str:
    """The namespace of the run of a submission."""
    labels = {**request.definition.labels, **request.labels}
    return request.namespace or labels.get(namespaces.LABEL, namespaces.DEFAULT)


def _key(namespace: str, definition: Definition, template: str, where: str, given: Mapping[str, Any]) -> str:
    """A key of the workflow, as it is stored."""
    try:
        rendered = templates.render(template, {"inputs": given, "steps": {}})
    except StepFailure as error:
        raise InvalidInput([Problem(where, error.message, "a template over the inputs")], "inputs") from None
    _require_storable({where: rendered})
    if len(rendered) > 300:
        rendered = hashlib.sha256(rendered.encode()).hexdigest()
    return admission.stored(namespace, definition.workflow, rendered)


def _without_key_of_caller(work: UnitOfWork, prepared: Prepared) -> Prepared:
    """Without its concurrency key, where a run that called it has the same."""
    key, parent = prepared.run["concurrency_key"], prepared.run["parent_step_id"]
    if key is None or parent is None or not admission.held_by_caller(work, key, parent):
        return prepared
    return replace(prepared, run={**prepared.run, "concurrency_key": None})

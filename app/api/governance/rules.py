"""The resource `rules`: store, show, switch on and off, remove, and test against history; and their firings."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import Depends, Path, Query, Response
from pydantic import BaseModel, Field

from app.access.callers import KeyScope
from app.api import bodies, problems
from app.api.bodies import RequestBody
from app.api.callers import InjectedCaller, ListedNamespace, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.governance.rules.firing import Firing, FiringState
from app.governance.rules.history import HistoryTest
from app.governance.rules.rule import Category, Severity
from app.governance.rules.service import RuleService, RuleView
from app.governance.rules.store import INSTALLATION
from app.kernel.errors import InvalidInput, Problem
from app.kernel.units import durations
from app.workflows.language.source import SourceDocument

router = ApiRouter(prefix="/v1/rules", tags=["governance"], dependencies=[requires(KeyScope.READ)])
firings_router = ApiRouter(prefix="/v1/firings", tags=["governance"], dependencies=[requires(KeyScope.READ)])

_Name = Annotated[str, Path(description="the name of the rule", examples=["errors-frequent"], max_length=200)]
_Last = Annotated[str, Query(description="how far back, 10m to 31d", max_length=50, examples=["24h"])]


def _service(services: InjectedServices, namespace: ListedNamespace) -> RuleService:
    return RuleService(services.database, services.settings.rules.max_rules, namespace or INSTALLATION)


_Service = Annotated[RuleService, Depends(_service)]


class RuleOut(BaseModel):
    """A rule and what it does now."""

    name: str
    namespace: str = Field(description="to whom it belongs; empty: it is over the whole installation")
    description: str
    category: Category
    severity: Severity
    priority: int
    version: int
    source: Literal["builtin", "file", "user"] = Field(description="who wrote this version")
    enabled: bool
    dry_run: bool
    state: Literal["off", "quiet", "pending", "firing"]
    firing: int = Field(description="firings that are open")
    pending: int = Field(description="firings that wait for their time, or for the cooldown")
    last_fired_at: datetime | None
    created_at: datetime
    updated_at: datetime
    rule: dict[str, Any] = Field(description="the stored document")


class RuleList(BaseModel):
    """Rules, by name."""

    rules: list[RuleOut]


class RuleVersionOut(BaseModel):
    """A version of a rule."""

    version: int
    source: Literal["builtin", "file", "user"]
    author: str
    created_at: datetime
    rule: dict[str, Any]


class RuleVersionList(BaseModel):
    """Versions, the newest first."""

    versions: list[RuleVersionOut]


class FiringOut(BaseModel):
    """A firing of a rule."""

    id: UUID
    rule: str
    rule_version: int
    namespace: str
    category: Category
    severity: Severity
    labels: dict[str, str]
    state: FiringState
    dry_run: bool
    pending_at: datetime
    fired_at: datetime | None
    cleared_at: datetime | None
    reason: str = Field(description="the conditions that held, with their values")
    cleared_reason: str
    values: dict[str, Any] = Field(description="what each condition saw, by its position")


class FiringList(BaseModel):
    """Firings, the newest first."""

    firings: list[FiringOut]
    next_cursor: UUID | None = Field(description="the value of `cursor` for the next page; null on the last page")


class PastFiringOut(BaseModel):
    """A firing that would have been."""

    value: str = Field(description="the value of the label `by`; empty for a rule over all")
    pending_at: datetime
    fired_at: datetime
    cleared_at: datetime | None = Field(description="null: it would still fire")
    reason: str


class RuleTestOut(BaseModel):
    """When a rule would have fired."""

    begin: datetime
    end: datetime
    measured_from: datetime | None = Field(description="the first observation; null: nothing was measured")
    step: str = Field(description="the time between two evaluations")
    evaluations: int
    groups: list[str] = Field(description="the values of the label `by` that were tested, at most 50")
    firings: list[PastFiringOut]
    firing_ratio: float = Field(description="the part of the time in which it would have fired")


_EXAMPLES = {
    "a model that fails": {
        "rule": "chat-fails",
        "category": "quality",
        "severity": "critical",
        "by": "model",
        "all": [{"signal": "error_rate", "operator": ">", "threshold": 0.2, "window": "5m", "at_least": 20}],
        "clear_for": "2m",
        "cooldown": "15m",
        "actions": [{"action": "alert"}],
    },
    "errors that doubled, in CEL": {
        "rule": "errors-doubled",
        "category": "quality",
        "all": [{"expression": "signals.error_rate.mean > 2.0 * previous.error_rate.mean", "window": "1h"}],
    },
}


@router.get("", summary="List rules", responses=problems.documented())
def page(rules: _Service, listed: ListedNamespace) -> RuleList:
    """Rules, by name: those of a namespace, or all."""
    return RuleList(rules=[_out(view) for view in rules.all(listed)])


@router.post(
    "/test",
    summary="Test a rule that is not stored",
    responses=problems.documented(413, 415, 422),
    openapi_extra=bodies.documented({"$ref": "#/components/schemas/Rule"}, _EXAMPLES),
)
def try_document(body: RequestBody, rules: _Service, last: _Last = "24h") -> RuleTestOut:
    """When the rule of the body would have fired. Nothing is stored."""
    return _test_out(rules.test(rules.parse(body), _last(last)))


@router.get("/{name}", summary="One rule", responses=problems.documented(404))
def get(name: _Name, rules: _Service) -> RuleOut:
    """A rule: its document, and what it does now."""
    return _out(rules.get(name))


@router.put(
    "/{name}",
    dependencies=[requires(KeyScope.OPERATE)],
    summary="Store a rule",
    responses=problems.documented(
        409, 413, 415, 422, others={201: {"model": RuleOut, "description": "Stored under a new name"}}
    ),
    openapi_extra=bodies.documented({"$ref": "#/components/schemas/Rule"}, _EXAMPLES),
)
def put(
    name: _Name,
    body: RequestBody,
    rules: _Service,
    caller: InjectedCaller,
    response: Response,
    enabled: Annotated[
        bool | None, Query(description="switch it on or off; by default a new rule is on, and others stay as they are")
    ] = None,
) -> RuleOut:
    """
    Store a rule, in JSON or YAML; 201 for a new one, 200 for a new version of another.

    What it fires now is cleared, and it is evaluated anew. A built-in rule can be changed, too.
    """
    rule = rules.parse(body)
    if rule.rule != name:
        problem = Problem("rule", f"the rule is named {rule.rule!r}, the URL names {name!r}", repr(name))
        raise InvalidInput([problem], "rule")
    view, created = rules.put(rule, caller.name, enabled=enabled)
    response.status_code = 201 if created else 200
    return _out(view)


@router.delete(
    "/{name}",
    status_code=204,
    dependencies=[requires(KeyScope.OPERATE)],
    summary="Remove a rule",
    responses=problems.documented(404, 409),
)
def delete(name: _Name, rules: _Service, caller: InjectedCaller) -> None:
    """Remove a rule; of a built-in one, what was changed. What it fires is cleared; the history of firings stays."""
    rules.delete(name, caller.name)


@router.post(
    "/{name}/enable",
    dependencies=[requires(KeyScope.OPERATE)],
    summary="Switch a rule on",
    responses=problems.documented(404),
)
def enable(name: _Name, rules: _Service) -> RuleOut:
    """Evaluate a rule from now on."""
    return _out(rules.enable(name, enabled=True))


@router.post(
    "/{name}/disable",
    dependencies=[requires(KeyScope.OPERATE)],
    summary="Switch a rule off",
    responses=problems.documented(404),
)
def disable(name: _Name, rules: _Service) -> RuleOut:
    """Evaluate a rule no more. What it fires is cleared."""
    return _out(rules.enable(name, enabled=False))


@router.get("/{name}/versions", summary="The versions of a rule", responses=problems.documented(404))
def versions(name: _Name, rules: _Service, limit: Annotated[int, Query(ge=1, le=200)] = 20) -> RuleVersionList:
    """The versions of a rule, the newest first, each with its author."""
    listed = [
        RuleVersionOut(
            version=one.version, source=one.source, author=one.author, created_at=one.created_at, rule=one.document
        )
        for one in rules.versions(name, limit)
    ]
    return RuleVersionList(versions=listed)


@router.post("/{name}/test", summary="Test a rule against history", responses=problems.documented(404, 422))
def try_stored(name: _Name, rules: _Service, last: _Last = "24h") -> RuleTestOut:
    """When a stored rule would have fired, whether it is on or off."""
    view = rules.get(name)
    found = rules.parse(SourceDocument(view.stored.document, {}))
    return _test_out(rules.test(found, _last(last)))


@firings_router.get("", summary="List firings", responses=problems.documented(422))
def firings(
    rules: _Service,
    listed: ListedNamespace,
    rule: Annotated[str | None, Query(max_length=200, description="of this rule")] = None,
    state: Annotated[FiringState | None, Query(description="in this state")] = None,
    cursor: Annotated[UUID | None, Query(description="`next_cursor` of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
) -> FiringList:
    """Firings of rules, the newest first."""
    found = rules.firings(listed, rule, state, cursor, limit + 1)
    more = len(found) > limit
    listed_out = [_firing_out(one) for one in found[:limit]]
    return FiringList(firings=listed_out, next_cursor=listed_out[-1].id if more else None)


@firings_router.get("/{firing_id}", summary="One firing", responses=problems.documented(404))
def firing(
    firing_id: Annotated[UUID, Path(description="the id of the firing")], rules: _Service, listed: ListedNamespace
) -> FiringOut:
    """A firing: why it began and ended, and what its conditions saw."""
    return _firing_out(rules.firing(firing_id, listed))


def _last(text: str) -> timedelta:
    try:
        return durations.parse(text)
    except ValueError:
        raise InvalidInput([Problem("last", f"{text!r} is not a duration", durations.ACCEPTED)], "query") from None


def _out(view: RuleView) -> RuleOut:
    stored, document = view.stored, view.stored.document
    return RuleOut.model_validate(
        {
            "name": stored.name,
            "namespace": stored.namespace,
            "description": document.get("description", ""),
            "category": document.get("category", Category.RESOURCES),
            "severity": document.get("severity", Severity.WARNING),
            "priority": document.get("priority", 50),
            "version": stored.version,
            "source": stored.source,
            "enabled": stored.enabled,
            "dry_run": document.get("dry_run", False),
            "state": view.state,
            "firing": view.firing,
            "pending": view.pending,
            "last_fired_at": view.last_fired_at,
            "created_at": stored.created_at,
            "updated_at": stored.updated_at,
            "rule": document,
        }
    )


def _firing_out(found: Firing) -> FiringOut:
    return FiringOut(
        id=found.id,
        rule=found.rule.rule,
        rule_version=found.rule_version,
        namespace=found.namespace,
        category=found.rule.category,
        severity=found.rule.severity,
        labels=dict(found.labels),
        state=found.state,
        dry_run=found.dry_run,
        pending_at=found.pending_at,
        fired_at=found.fired_at,
        cleared_at=found.cleared_at,
        reason=found.reason,
        cleared_reason=found.cleared_reason,
        values=dict(found.values),
    )


def _test_out(found: HistoryTest) -> RuleTestOut:
    return RuleTestOut(
        begin=found.begin,
        end=found.end,
        measured_from=found.measured_from,
        step=durations.show(found.step),
        evaluations=found.evaluations,
        groups=[group for group in found.groups if group],
        firings=[
            PastFiringOut(
                value=one.value,
                pending_at=one.pending_at,
                fired_at=one.fired_at,
                cleared_at=one.cleared_at,
                reason=one.reason,
            )
            for one in found.firings
        ],
        firing_ratio=found.firing_ratio,
    )

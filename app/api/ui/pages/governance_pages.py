"""The pages of rules and alerts: what fires, tests against history, silences, and who was told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from fastapi import Path, Query, Request
from fastapi.responses import HTMLResponse

from app.access.callers import KeyScope
from app.api.callers import InjectedCaller, ListedNamespace, requires
from app.api.governance import alerts as alerts_resource
from app.api.governance import channels as channels_resource
from app.api.governance import rules as rules_resource
from app.api.governance import silences as silences_resource
from app.api.governance.rules import RuleTestOut
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.api.ui.pages.written import written
from app.api.ui.rendering import render
from app.governance.alerts.alert import AlertState
from app.governance.rules.service import RuleService
from app.governance.rules.store import INSTALLATION

router = ApiRouter(prefix="/ui", include_in_schema=False, dependencies=[requires(KeyScope.READ)])

#: The width of the strip that shows when a rule would have fired.
_STRIP = 1000.0


@dataclass(frozen=True, slots=True)
class FiredSpan:
    """A span of the strip in which a rule would have fired."""

    x: float
    width: float


@router.get("/alerts")
def listed(
    request: Request,
    caller: InjectedCaller,
    services: InjectedServices,
    namespace: ListedNamespace,
    shown: Literal["open", "all"] = "open",
    cursor: UUID | None = None,
) -> HTMLResponse:
    """Alerts, rules, silences and channels."""
    states = list(AlertState) if shown == "all" else None
    found = alerts_resource.page(services, namespace, states, limit=50, cursor=cursor)
    rules = rules_resource.page(_rules(services, namespace), namespace).rules
    return render(
        request,
        caller,
        "rules.html",
        title="Rules and alerts",
        namespace=namespace,
        shown=shown,
        alerts=found.alerts,
        next_alerts=found.next_cursor,
        rules=sorted(rules, key=lambda one: (one.state not in ("firing", "pending"), one.name)),
        silences=silences_resource.page(services, namespace).silences,
        channels=channels_resource.page(services, namespace).channels,
        notifications=alerts_resource.notifications(services, namespace, limit=8).notifications,
    )


@router.get("/alerts/{alert_id}")
def alert(
    request: Request, caller: InjectedCaller, services: InjectedServices, namespace: ListedNamespace, alert_id: UUID
) -> HTMLResponse:
    """An alert with its history."""
    found = alerts_resource.get(services, namespace, alert_id)
    return render(request, caller, "alert.html", title=found.rule, alert=found)


@router.get("/rules/{name}")
def rule(
    request: Request,
    caller: InjectedCaller,
    services: InjectedServices,
    namespace: ListedNamespace,
    name: Annotated[str, Path(max_length=200)],
    last: Annotated[str | None, Query(max_length=10)] = None,
) -> HTMLResponse:
    """A rule: its firings, its versions, and when it would have fired."""
    rules = _rules(services, namespace)
    found = rules_resource.get(name, rules)
    tested = rules_resource.try_stored(name, rules, last) if last else None
    signals = [one["signal"] for key in ("all", "any") for one in found.rule.get(key, ()) if "signal" in one]
    return render(
        request,
        caller,
        "rule.html",
        title=name,
        rule=found,
        text=written(found.rule),
        signals=list(dict.fromkeys(signals)),
        firings=rules_resource.firings(rules, namespace, rule=name, limit=50).firings,
        versions=rules_resource.versions(name, rules).versions,
        last=last or "24h",
        tested=tested,
        strip=[] if tested is None else strip_of(tested),
    )


def strip_of(tested: RuleTestOut) -> Sequence[FiredSpan]:
    """Return the spans in which the rule would have fired, on a strip of the whole time."""
    whole = (tested.end - tested.begin).total_seconds() or 1.0

    def place(at: datetime) -> float:
        return min(max((at - tested.begin).total_seconds() / whole, 0.0), 1.0) * _STRIP

    spans = [(place(one.fired_at), place(one.cleared_at or tested.end)) for one in tested.firings]
    return [FiredSpan(round(begin, 1), round(max(end - begin, 2.0), 1)) for begin, end in spans]


def _rules(services: InjectedServices, namespace: str | None) -> RuleService:
    return RuleService(services.database, services.settings.rules.max_rules, namespace or INSTALLATION)

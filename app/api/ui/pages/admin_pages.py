"""The pages for operators: settings with their history, keys and limits, the audit log."""

from __future__ import annotations

from itertools import groupby
from typing import Annotated
from uuid import UUID

from fastapi import Query, Request
from fastapi.responses import HTMLResponse

from app.access.callers import KeyScope
from app.api.access import keys as keys_resource
from app.api.admin import audit as audit_resource
from app.api.admin import call_limits as limits_resource
from app.api.admin import settings as settings_resource
from app.api.callers import InjectedCaller, ListedNamespace, requires
from app.api.fleet import namespaces as namespaces_resource
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.api.ui.pages.trends_page import seconds
from app.api.ui.rendering import render

router = ApiRouter(prefix="/ui", include_in_schema=False, dependencies=[requires(KeyScope.ADMIN)])

_Text = Annotated[str, Query(max_length=200, pattern=r"^[^\x00]*$")]
_SCOPES = (
    (KeyScope.SUBMIT, "create runs, call models, send events, cancel what is its own"),
    (KeyScope.READ, "look at everything of its namespace"),
    (KeyScope.OPERATE, "change workflows, schedules, rules, pools and hosts"),
    (KeyScope.ADMIN, "keys, limits, settings and the audit log"),
)
_LIMITS = (
    ("requests_per_minute", "Requests per minute"),
    ("tokens_per_minute", "Tokens per minute"),
    ("concurrent_calls", "Calls at a time"),
    ("waiting_interactive", "Waiting, interactive"),
    ("waiting_batch", "Waiting, batch"),
)


@router.get("/settings", dependencies=[requires(KeyScope.ADMIN, all_namespaces=True)])
def settings(
    request: Request,
    caller: InjectedCaller,
    services: InjectedServices,
    q: _Text = "",
    changed: bool = False,
) -> HTMLResponse:
    """Every setting by its section, and the history of what was changed while the processes ran."""
    found = settings_resource.get(services)
    rows = [
        one
        for one in found.settings
        if q.strip().lower() in one.key.lower() and (not changed or one.origin != "default")
    ]
    by_section = groupby(sorted(rows, key=_section), key=_section)
    return render(
        request,
        caller,
        "settings.html",
        title="Settings",
        q=q,
        changed=changed,
        settings=found,
        sections=[(section, list(of)) for section, of in by_section],
        versions=settings_resource.history(services).versions,
    )


def _section(one: settings_resource.SettingOut) -> str:
    return one.key.partition(".")[0] if "." in one.key else "general"


@router.get("/keys")
def keys(request: Request, caller: InjectedCaller, services: InjectedServices) -> HTMLResponse:
    """Keys, limits on calls, and what namespaces use."""
    found = keys_resource.page(services, caller, 1000).keys
    return render(
        request,
        caller,
        "keys.html",
        title="Keys",
        keys=sorted(found, key=lambda one: (one.revoked_at is not None, one.name)),
        scopes=[(scope, meaning) for scope, meaning in _SCOPES if scope in caller.scopes],
        limits=[one.model_dump(mode="json") for one in limits_resource.page(services, caller).limits],
        limit_names=_LIMITS,
        namespaces=namespaces_resource.page(services, caller).namespaces,
        seconds=seconds,
    )


@router.get("/audit")
def audit(
    request: Request,
    caller: InjectedCaller,
    services: InjectedServices,
    namespace: ListedNamespace,
    actor: _Text = "",
    action: _Text = "",
    target: _Text = "",
    cursor: UUID | None = None,
) -> HTMLResponse:
    """Changes, the newest first."""
    found = audit_resource.page(
        services, namespace, actor or None, action or None, target or None, limit=100, cursor=cursor
    )
    return render(
        request,
        caller,
        "audit.html",
        title="Audit log",
        entries=found.entries,
        next=found.next_cursor,
        actor=actor,
        action=action,
        target=target,
    )

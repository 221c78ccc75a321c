"""
Rendering of pages: the templates, what all of them know, and the headers of every page.

A page loads nothing from other servers, and runs no script that is not a file of this one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from app import __version__
from app.access.callers import Caller, KeyScope
from app.api.access import sessions
from app.api.callers import COOKIE
from app.kernel.units import sizes

_HERE = Path(__file__).parent
STATIC = _HERE / "static"
#: The path of the files of pages.
ASSETS = "/ui/assets"
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class NavigationEntry:
    """A page in the navigation."""

    path: str
    title: str
    #: Pressed after `g`, it leads there.
    key: str
    #: What a caller needs to see it.
    scope: KeyScope = KeyScope.READ
    #: It concerns all namespaces.
    all_namespaces: bool = False


NAVIGATION = (
    NavigationEntry("/ui/overview", "Overview", "o"),
    NavigationEntry("/ui/runs", "Runs", "r"),
    NavigationEntry("/ui/queues", "Queues", "q"),
    NavigationEntry("/ui/fleet", "Fleet", "f", all_namespaces=True),
    NavigationEntry("/ui/workflows", "Workflows", "w"),
    NavigationEntry("/ui/schedules", "Schedules", "d"),
    NavigationEntry("/ui/playground", "Playground", "p"),
    NavigationEntry("/ui/conversations", "Memory", "m"),
    NavigationEntry("/ui/batches", "Batches", "b"),
    NavigationEntry("/ui/handoffs", "Hand-offs", "h"),
    NavigationEntry("/ui/alerts", "Rules and alerts", "a"),
    NavigationEntry("/ui/trials", "Trials", "x", all_namespaces=True),
    NavigationEntry("/ui/trends", "Trends", "t"),
    NavigationEntry("/ui/keys", "Keys", "k", KeyScope.ADMIN),
    NavigationEntry("/ui/settings", "Settings", "s", KeyScope.ADMIN, all_namespaces=True),
    NavigationEntry("/ui/audit", "Audit log", "l", KeyScope.ADMIN),
)


@dataclass(frozen=True, slots=True)
class Abilities:
    """What the caller of a page may do: buttons that would be refused are not shown."""

    submit: bool
    operate: bool
    admin: bool


@cache
def _static(name: str) -> str:
    """Return the address of a file, with a mark that changes with its content."""
    mark = hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:10]
    return f"{ASSETS}/{name}?v={mark}"


def _instant(value: datetime | float | str) -> datetime:
    if isinstance(value, datetime):
        return value.astimezone(UTC)
    if isinstance(value, str):
        return datetime.fromisoformat(value).astimezone(UTC)
    return datetime.fromtimestamp(value, UTC)


_environment = Environment(
    loader=FileSystemLoader(_HERE / "templates"),
    autoescape=select_autoescape(default=True, default_for_string=True),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_environment.filters["instant"] = _instant
# Unlike `tojson` it is escaped as any text, so a reader sees quotes and not their codes.
_environment.filters["indented"] = lambda value: json.dumps(value, indent=1, ensure_ascii=False)
_environment.globals.update(static=_static, bytes=sizes.rounded)


def render(request: Request, caller: Caller, template: str, *, title: str, **values: Any) -> HTMLResponse:
    """Return a page for its caller."""
    pages = [
        page
        for page in NAVIGATION
        if page.scope in caller.scopes and not (page.all_namespaces and caller.namespace is not None)
    ]
    text = _environment.get_template(template).render(
        title=title,
        caller=caller,
        can=Abilities(*(scope in caller.scopes for scope in (KeyScope.SUBMIT, KeyScope.OPERATE, KeyScope.ADMIN))),
        navigation=pages,
        path=request.url.path,
        token=sessions.token_of(request.cookies.get(COOKIE, "")),
        release=__version__,
        **values,
    )
    return HTMLResponse(text, headers=dict(HEADERS))

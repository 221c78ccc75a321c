"""
The guard of the API: what web pages of other sites could send is refused before it reaches an endpoint.

A body needs a media type that a form cannot send: whatever has one is asked about by the browser before (a preflight),
and that question is refused. A form without fields has no body, but names its type.
"""

from __future__ import annotations

from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api import problems
from app.api.bodies import JSON, YAML, UnsupportedMediaType
from app.kernel.errors import Problem
from app.kernel.security.request_guard import STATUS, ForbiddenRequest, RequestGuard

#: What a page of any site may send without a preflight.
_OF_FORMS = {"", "application/x-www-form-urlencoded", "multipart/form-data", "text/plain"}


class GuardMiddleware:
    """ASGI middleware that refuses requests as a `RequestGuard` says, and bodies of the types of forms."""

    def __init__(self, app: ASGIApp, guard: RequestGuard) -> None:
        self._app, self._guard = app, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        refusal = self._guard.refuse(scope["method"], headers, (scope.get("server") or [None])[0])
        if refusal is not None:
            await problems.of_error(STATUS, ForbiddenRequest([refusal]))(scope, receive, send)
            return
        unusable = _refuse_body(scope["method"], headers)
        if unusable is not None:
            await problems.of_error(415, UnsupportedMediaType([unusable]))(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _refuse_body(method: str, headers: Iterable[tuple[str, str]]) -> Problem | None:
    """What is wrong with the media type of the body, where there is one, or could be."""
    first = {name.lower(): value for name, value in headers}
    has_body = first.get("content-length", "0").strip() not in ("", "0") or "transfer-encoding" in first
    if not has_body and ("content-type" not in first or method in ("GET", "HEAD", "OPTIONS")):
        return None
    media_type = first.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in _OF_FORMS:
        return None
    wrong = f"{media_type!r} is not offered" if media_type else "it is missing"
    return Problem("Content-Type", wrong, f"{JSON}, {YAML}")

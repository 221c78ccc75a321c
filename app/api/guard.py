"""
The request guard of the API: requests that web pages of other sites could send are refused before any endpoint.

A body needs a media type that a form cannot send: for such a type the browser first sends a preflight request, which is
refused unless its origin is one of `api.cors_origins`. A form without fields has no body, but it has a content type.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api import problems
from app.api.bodies import JSON, YAML, UnsupportedMediaType
from app.kernel.errors import Problem
from app.kernel.security.request_guard import STATUS, ForbiddenRequest, RequestGuard

#: The media types that a page of any site can send without a preflight.
_FORM_TYPES = {"", "application/x-www-form-urlencoded", "multipart/form-data", "text/plain"}


class GuardMiddleware:
    """ASGI middleware that refuses requests according to a `RequestGuard`, and bodies with media types of forms."""

    def __init__(self, app: ASGIApp, guard: RequestGuard, origins: Callable[[], Collection[str]] = tuple) -> None:
        """`origins` are those of the moment whose pages may send requests (CORS)."""
        self._app, self._guard, self._origins = app, guard, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        address = (scope.get("server") or [None])[0]
        refusal = self._guard.refuse(scope["method"], headers, address, self._origins())
        if refusal is not None:
            await problems.of_error(STATUS, ForbiddenRequest([refusal]))(scope, receive, send)
            return
        problem = _refuse_body(scope["method"], headers)
        if problem is not None:
            await problems.of_error(415, UnsupportedMediaType([problem]))(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _refuse_body(method: str, headers: Iterable[tuple[str, str]]) -> Problem | None:
    """
    Return what is wrong with the media type of the body, or None.

    A content type without a body is checked too, except for GET, HEAD and OPTIONS.
    """
    first = {name.lower(): value for name, value in headers}
    has_body = first.get("content-length", "0").strip() not in ("", "0") or "transfer-encoding" in first
    if not has_body and ("content-type" not in first or method in ("GET", "HEAD", "OPTIONS")):
        return None
    media_type = first.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in _FORM_TYPES:
        return None
    wrong = f"{media_type!r} is not supported" if media_type else "the header is missing"
    return Problem("Content-Type", wrong, f"{JSON}, {YAML}")

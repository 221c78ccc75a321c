"""
The request guard of the API: requests that web pages of other sites could send are refused before any endpoint.

A body needs a media type that a form cannot send: for such a type the browser first sends a preflight request, which is
refused unless its origin is one of `api.cors_origins`. A form without fields has no body, but it has a content type.

One endpoint accepts `multipart/form-data`, which every page can send: a request for it needs a sign that no page of
another site has sent it (`_is_unforged`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.bodies import JSON, YAML, UnsupportedMediaType
from app.api.error_forms import ErrorForms
from app.kernel.errors import InvalidInput, Problem
from app.kernel.security.request_guard import STATUS, ForbiddenRequest, RequestGuard

#: The media types that a page of any site can send without a preflight.
_MULTIPART = "multipart/form-data"
_FORM_TYPES = {"", "application/x-www-form-urlencoded", _MULTIPART, "text/plain"}
#: The refusal of a form that a page of another site may have sent.
_FORGEABLE = "a browser sent this form without naming the page that it is from"
_PROOFS = "a form with the header Origin, Sec-Fetch-Site or Authorization; programs that are no browsers need none"


class GuardMiddleware:
    """ASGI middleware that refuses requests according to a `RequestGuard`, and bodies with media types of forms."""

    def __init__(
        self,
        app: ASGIApp,
        guard: RequestGuard,
        errors: ErrorForms,
        origins: Callable[[], Collection[str]] = tuple,
        forms: frozenset[str] = frozenset(),
    ) -> None:
        """
        `origins` are those of the moment whose pages may send requests (CORS).

        `forms` are the paths whose POST accepts `multipart/form-data`.
        """
        self._app, self._guard, self._errors = app, guard, errors
        self._origins, self._forms = origins, forms

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        address = (scope.get("server") or [None])[0]
        refusal = self._guard.refuse(scope["method"], headers, address, self._origins())
        if refusal is not None:
            await self._refuse(scope, receive, send, STATUS, ForbiddenRequest([refusal]))
            return
        accepts_forms = scope["method"] == "POST" and scope["path"] in self._forms
        problem = _refuse_body(scope["method"], headers, accepts_forms=accepts_forms)
        if problem is not None:
            await self._refuse(scope, receive, send, 415, UnsupportedMediaType([problem]))
            return
        await self._app(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, status: int, error: InvalidInput) -> None:
        await self._errors.of_error(scope["path"], status, error)(scope, receive, send)


def _refuse_body(method: str, headers: Iterable[tuple[str, str]], *, accepts_forms: bool) -> Problem | None:
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
    if accepts_forms:
        if media_type != _MULTIPART:
            return Problem("Content-Type", f"{media_type!r} is not supported", _MULTIPART)
        return None if _is_unforged(first) else Problem("Content-Type", _FORGEABLE, _PROOFS)
    wrong = f"{media_type!r} is not supported" if media_type else "the header is missing"
    return Problem("Content-Type", wrong, f"{JSON}, {YAML}")


def _is_unforged(headers: Mapping[str, str]) -> bool:
    """
    Whether no page of another site can have sent a form that has passed the guard.

    The guard has refused those whose Origin or Sec-Fetch-Site names another site. Browsers that send neither with a
    form are left. No form can set Authorization, nor change the User-Agent, which in each of them begins with Mozilla.
    """
    if any(name in headers for name in ("origin", "sec-fetch-site", "authorization")):
        return True
    return "mozilla/" not in headers.get("user-agent", "").lower()

"""
CORS: pages of the origins in `api.cors_origins` may call the API from a browser, with a key in a header.

Cookies are never part of it. The guard refuses preflights and requests of all other origins before they come here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

#: Headers of answers that scripts may read.
_EXPOSED = (
    *("Location", "Retry-After", "X-Arriero-Run", "X-Request-Id", "RateLimit", "RateLimit-Policy"),
    *("X-Arriero-Cache", "X-Arriero-Similarity", "Age", "X-Arriero-Model", "X-Arriero-Reason", "Preference-Applied"),
    "WWW-Authenticate",
    *(f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")),
)
#: Seconds for which a browser may keep the answer to a preflight.
_MAX_AGE = 600


class CorsMiddleware(CORSMiddleware):
    """Starlette's middleware, for the origins of the moment."""

    def __init__(self, app: ASGIApp, origins: Callable[[], Collection[str]]) -> None:
        super().__init__(
            app,
            allow_methods=("GET", "POST", "PUT", "PATCH", "DELETE"),
            allow_headers=("*",),
            expose_headers=_EXPOSED,
            max_age=_MAX_AGE,
        )
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the preflight of an accepted origin, and add its headers to answers; pass all others on."""
        accepted = scope["type"] == "http" and self.is_allowed_origin(Headers(scope=scope).get("origin", ""))
        await (super().__call__ if accepted else self.app)(scope, receive, send)

    def is_allowed_origin(self, origin: str) -> bool:
        """Whether pages of the origin may call the API."""
        return origin in self._origins()

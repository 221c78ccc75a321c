"""The activity of the API: requests that may change something are noted, so that the scheduled jobs follow soon."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from app.kernel.activity import Activity

_READS = {"GET", "HEAD", "OPTIONS"}


class ActivityMiddleware:
    """ASGI middleware that notes activity after each request of another method than GET, HEAD and OPTIONS."""

    def __init__(self, app: ASGIApp, activity: Activity) -> None:
        self._app, self._activity = app, activity

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        try:
            await self._app(scope, receive, send)
        finally:
            if scope["type"] == "http" and scope["method"] not in _READS:
                self._activity.note()

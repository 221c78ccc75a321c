"""The span of a request: it continues the trace of the client, and the runs and calls of the request continue it."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.telemetry.requests import route_of
from app.kernel import tracing

#: What is asked again and again, and would fill a store of traces.
_UNTRACED = frozenset({"/healthz", "/readyz", "/metrics"})


class TracingMiddleware:
    """ASGI middleware with a span for each request, while traces are recorded."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on within its span."""
        if not tracing.is_on() or scope["type"] != "http" or scope["path"] in _UNTRACED:
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == b"traceparent"]
        parent = given[0].decode("latin-1") if len(given) == 1 else None
        method = scope["method"] if len(scope["method"]) <= 16 else "_OTHER"
        attributes = {"http.request.method": method, "url.scheme": scope["scheme"]}
        with tracing.span(method, kind="server", parent=parent, attributes=attributes) as span:

            async def sending(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set({"http.response.status_code": message["status"]})
                    if message["status"] >= 500:
                        span.failed(str(message["status"]))
                await send(message)

            try:
                await self._app(scope, receive, sending)
            finally:
                route = route_of(scope)
                if route != "unmatched":
                    span.rename(f"{method} {route}")
                    span.set({"http.route": route})

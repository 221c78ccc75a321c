"""
Metrics of the requests to this process: their number by status, and their time.

A route is the path with its parameters' names, so that ids make no series. What no route has is `unmatched`.
"""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
#: Upper bounds in seconds. Streams of tokens and waits for results last longest.
_BOUNDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class RequestMetrics:
    """The metrics of one process."""

    def __init__(self) -> None:
        # The instant of each first count would be half of all series.
        disable_created_metrics()  # type: ignore[no-untyped-call] # untyped library
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "arriero_http_requests",
            "Requests, by the status of their answer; 499 where the client went away before it.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self.durations = Histogram(
            "arriero_http_request_duration_seconds",
            "Time from the beginning of a request to the end of its answer.",
            ("method", "route"),
            buckets=_BOUNDS,
            registry=self.registry,
        )
        self.open = Gauge("arriero_http_requests_in_flight", "Requests that are not answered.", registry=self.registry)


class RequestMetricsMiddleware:
    """ASGI middleware that counts requests."""

    def __init__(self, app: ASGIApp, metrics: RequestMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and count it when it has been answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, began = 499, time.monotonic()

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.open.inc()
        try:
            await self._app(scope, receive, sending)
        except Exception:
            status = 500
            raise
        finally:
            self._metrics.open.dec()
            route, method = route_of(scope), scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.requests.labels(method, route, str(status)).inc()
            self._metrics.durations.labels(method, route).observe(time.monotonic() - began)


def route_of(scope: Scope) -> str:
    """Return the path of the route that answers, with the names of its parameters."""
    return str(getattr(scope.get("route"), "path", None) or "unmatched")

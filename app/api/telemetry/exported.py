"""The metrics of the installation and of this process, for Prometheus."""

from __future__ import annotations

from fastapi import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest

from app.access.callers import KeyScope
from app.api import problems
from app.api.callers import requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.api.telemetry.cluster import ClusterMetrics

router = ApiRouter(tags=["metrics"], dependencies=[requires(KeyScope.READ, all_namespaces=True)])

_PROCESS = CollectorRegistry()
ProcessCollector(registry=_PROCESS)


@router.get("/metrics", summary="Metrics for Prometheus", response_class=Response, responses=problems.documented())
def metrics(services: InjectedServices) -> Response:
    """
    Metrics of queues, runs, the fleet, the broker, and of the requests to this process.

    The metrics of work are those of the workers and pools, each at a port of its own. The answer is 200 while the
    database or the broker is down: `arriero_component_up` says so, and what cannot be read is missing.
    """
    cluster = CollectorRegistry()
    cluster.register(ClusterMetrics(services))
    content = b"".join(generate_latest(one) for one in (cluster, services.request_metrics.registry, _PROCESS))
    return Response(content, media_type=CONTENT_TYPE_LATEST)

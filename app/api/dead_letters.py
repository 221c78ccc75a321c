"""The resource `dead-letters`: messages that workers could not read; and the metrics of the API for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel, Field

from app.access.callers import KeyScope
from app.api import problems
from app.api.callers import requires
from app.api.services import InjectedServices
from app.inference import refinement_counters
from app.kernel.dead_letters import KEPT, DeadLetters

router = APIRouter(tags=["dead letters"], dependencies=[requires(KeyScope.READ, all_namespaces=True)])


class DeadLetterOut(BaseModel):
    """A message that could not be read, or a key of a wrong type."""

    at: datetime
    queue: str = Field(description="the queue or key where it was found")
    reason: str = Field(examples=["unreadable", "too_large", "unknown_task", "wrong_arguments", "wrong_type"])
    detail: str = Field(description="what was wrong with it")
    bytes: int = Field(description="its length in bytes")
    message: str = Field(description="its beginning")


class DeadLetterList(BaseModel):
    """The newest dead letters."""

    dead_letters: list[DeadLetterOut]
    kept: int = Field(description=f"number of dead letters that are kept, at most the last {KEPT}")
    counts: dict[str, dict[str, int]] = Field(description="number of all dead letters so far, by queue and reason")


class Cleared(BaseModel):
    """The result of a removal."""

    removed: int


@router.get("/v1/dead-letters", summary="List dead letters", responses=problems.documented(422))
def page(services: InjectedServices, limit: Annotated[int, Query(ge=1, le=KEPT)] = 50) -> DeadLetterList:
    """Messages that workers could not read, the newest first. Their steps run nevertheless."""
    letters = services.publisher.dead_letters()
    counts: dict[str, dict[str, int]] = {}
    for (queue, reason), count in letters.counts().items():
        counts.setdefault(queue, {})[reason] = count
    found = [
        DeadLetterOut(
            at=one.at, queue=one.queue, reason=one.reason, detail=one.detail, bytes=one.bytes, message=one.message
        )
        for one in letters.newest(limit)
    ]
    return DeadLetterList(dead_letters=found, kept=letters.kept(), counts=counts)


@router.delete(
    "/v1/dead-letters",
    dependencies=[requires(KeyScope.OPERATE, all_namespaces=True)],
    summary="Remove dead letters",
    responses=problems.documented(),
)
def clear(services: InjectedServices) -> Cleared:
    """Remove all dead letters and the kept values of keys with a wrong type. The counts stay."""
    return Cleared(removed=services.publisher.dead_letters().clear())


@router.get("/metrics", summary="Metrics for Prometheus", response_class=Response, responses=problems.documented())
def metrics(services: InjectedServices) -> Response:
    """Metrics of the broker and of refined outputs. Each pool has a port of its own for its metrics."""
    registry = CollectorRegistry()
    registry.register(_BrokerMetrics(services.publisher.dead_letters()))
    with services.publisher.connection() as client:
        registry.register(_RefinementMetrics(refinement_counters.read(client)))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class _BrokerMetrics(Collector):
    """Collects the metrics of the dead letters, which it reads when it is created."""

    def __init__(self, letters: DeadLetters) -> None:
        self._kept, self._counts = letters.kept(), letters.counts()

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("arriero_dead_letters_kept", "Dead letters that are kept.", value=self._kept)
        total = CounterMetricFamily(
            "arriero_dead_letters", "Messages and keys that workers could not read.", labels=("queue", "reason")
        )
        for labels, count in self._counts.items():
            total.add_metric(labels, count)
        yield total


class _RefinementMetrics(Collector):
    """Collects the counters of refine, ensemble and verify steps."""

    def __init__(self, counts: refinement_counters.RefinementCounts) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        for name, (meaning, label) in refinement_counters.COUNTERS.items():
            family = CounterMetricFamily(f"arriero_refinement_{name}", meaning, labels=("kind", label))
            for kind, value, count in self._counts.get(name, ()):
                family.add_metric((kind, value), count)
            yield family

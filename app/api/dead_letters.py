"""Dead letters: what workers found in the broker and could not read; and the figures of the broker for Prometheus."""

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

from app.api import problems
from app.api.services import InjectedServices
from app.kernel.dead_letters import KEPT, DeadLetters

router = APIRouter(tags=["dead letters"])


class DeadLetterOut(BaseModel):
    """A message that was put aside, or a key of a wrong type."""

    at: datetime
    queue: str = Field(description="where it was found")
    reason: str = Field(examples=["unreadable", "too_large", "unknown_task", "wrong_arguments", "wrong_type"])
    detail: str = Field(description="what was wrong with it")
    bytes: int = Field(description="its length")
    message: str = Field(description="its beginning")


class DeadLetterList(BaseModel):
    """The newest dead letters."""

    dead_letters: list[DeadLetterOut]
    kept: int = Field(description=f"how many are kept: the last {KEPT} at the most")
    counts: dict[str, dict[str, int]] = Field(description="how many there ever were, by queue and reason")


class Cleared(BaseModel):
    """What was removed."""

    removed: int


@router.get("/v1/dead-letters", summary="List dead letters", responses=problems.documented(422))
def page(services: InjectedServices, limit: Annotated[int, Query(ge=1, le=KEPT)] = 50) -> DeadLetterList:
    """What workers could not read, the newest first. Steps that were meant are done all the same."""
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


@router.delete("/v1/dead-letters", summary="Remove dead letters", responses=problems.documented())
def clear(services: InjectedServices) -> Cleared:
    """Remove all that are kept, with the values of keys that were of a wrong type. The counts stay."""
    return Cleared(removed=services.publisher.dead_letters().clear())


@router.get("/metrics", summary="Figures for Prometheus", response_class=Response, responses=problems.documented())
def metrics(services: InjectedServices) -> Response:
    """What is counted in the broker. Pools have ports of their own for what they do."""
    registry = CollectorRegistry()
    registry.register(_Figures(services.publisher.dead_letters()))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class _Figures(Collector):
    """Reads the broker when it is asked."""

    def __init__(self, letters: DeadLetters) -> None:
        self._kept, self._counts = letters.kept(), letters.counts()

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("arriero_dead_letters_kept", "Dead letters that can be looked at.", value=self._kept)
        ever = CounterMetricFamily(
            "arriero_dead_letters", "Messages and keys that workers could not read.", labels=("queue", "reason")
        )
        for labels, count in self._counts.items():
            ever.add_metric(labels, count)
        yield ever

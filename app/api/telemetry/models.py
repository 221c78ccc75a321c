"""The resource `metrics/models`: what models did in a window, by kind of operation."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated

from fastapi import Query
from pydantic import AwareDatetime, BaseModel, Field

from app.access.callers import KeyScope
from app.api import problems
from app.api.callers import ListedNamespace, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.inference.model_metrics import store
from app.inference.model_metrics.latency import Latencies
from app.inference.model_metrics.metric import ModelMetric, Operation
from app.kernel import clock
from app.kernel.errors import InvalidInput, Problem
from app.kernel.units import durations
from app.kernel.units.durations import Duration

router = ApiRouter(prefix="/v1/metrics", tags=["metrics"], dependencies=[requires(KeyScope.READ)])

#: The longest window.
_LONGEST = store.KEPT_FOR


class LatencyOut(BaseModel):
    """Seconds of the operations that succeeded; null without any. Quantiles are accurate to a third of their value."""

    count: int
    min: float | None
    avg: float | None
    max: float | None
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None


class ModelTokensOut(BaseModel):
    """Tokens: for a compression, those before and after it."""

    read: int = Field(description="of prompts, texts and documents; for a compression, before it")
    written: int = Field(description="generated; for a compression, what is left")
    saved: int = Field(description="not computed again, because an earlier prompt had them; or left out by compression")


class ModelMetricOut(BaseModel):
    """What a model did of one kind."""

    model: str = Field(description="of a compression, the model whose tokens are counted")
    operation: Operation
    operations: int
    succeeded: int
    failed: int
    cancelled: int
    success_rate: float | None = Field(description="of those that were not cancelled, 0 to 1; null without any")
    latency_s: LatencyOut
    first_token_s: LatencyOut | None = Field(description="to the first token of a text; null for what writes none")
    tokens: ModelTokensOut
    tokens_per_second: float | None = Field(
        description="of one operation: written after the first token; for others, read"
    )
    ratio: float | None = Field(description="of compressions: tokens before, for each one after")


class ModelMetricsOut(BaseModel):
    """The metrics of all models in a window."""

    since: datetime = Field(description="the window; whole intervals of five minutes, or of an hour after a week")
    until: datetime
    models: list[ModelMetricOut]
    totals: list[ModelMetricOut] = Field(description="by kind of operation; `model` is `*`")


@router.get("/models", summary="What models did", responses=problems.documented(422))
def models(
    services: InjectedServices,
    namespace: ListedNamespace,
    last: Annotated[Duration, Query(description="the length of the window: `1h`, `7d`")] = timedelta(days=1),
    until: Annotated[AwareDatetime | None, Query(description="its end, by default now")] = None,
    model: Annotated[str | None, Query(max_length=200, pattern=r"^[^\x00]*$")] = None,
    operation: Annotated[Operation | None, Query(description="only operations of this kind")] = None,
) -> ModelMetricsOut:
    """
    Operations, success rate, latency, tokens and speed of embedding, reasoning, reranking and compression.

    A key of a namespace sees what was done for it. Work shows after some seconds. What is asked for here is stored by
    interval, so the answer is as fast for a month as for an hour.
    """
    if not timedelta(0) < last <= _LONGEST:
        raise InvalidInput(
            [Problem("query.last", "no possible window", f"more than 0, at most {durations.show(_LONGEST)}")], "query"
        )
    end = until or clock.now()
    begin = end - last
    with services.database.work() as work:
        found = store.read(work, begin, end, namespace=namespace, model=model, operation=operation)
    totals: dict[Operation, ModelMetric] = {}
    for (_, kind), metric in found.items():
        totals.setdefault(kind, ModelMetric()).merge(metric)
    ordered = sorted(found.items(), key=lambda one: (-one[1].operations, one[0]))
    return ModelMetricsOut(
        since=store.interval_of(begin),
        until=end,
        models=[_out(name, kind, metric) for (name, kind), metric in ordered],
        totals=[_out("*", kind, metric) for kind, metric in sorted(totals.items())],
    )


def _out(model: str, operation: Operation, metric: ModelMetric) -> ModelMetricOut:
    return ModelMetricOut(
        model=model,
        operation=operation,
        operations=metric.operations,
        succeeded=metric.succeeded,
        failed=metric.failed,
        cancelled=metric.cancelled,
        success_rate=metric.success_rate,
        latency_s=_latency(metric.latency),
        first_token_s=_latency(metric.first_token) if metric.first_token.count else None,
        tokens=ModelTokensOut(read=metric.tokens_in, written=metric.tokens_out, saved=metric.tokens_saved(operation)),
        tokens_per_second=metric.tokens_per_second(operation),
        ratio=metric.ratio(operation),
    )


def _latency(found: Latencies) -> LatencyOut:
    quantiles = {f"p{part}": found.quantile(part / 100) for part in (50, 90, 95, 99)}
    return LatencyOut(count=found.count, min=found.least, avg=found.mean, max=found.greatest, **quantiles)

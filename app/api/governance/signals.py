"""The resource `signals`: what is measured, now and over time."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Annotated, Literal

from fastapi import Path, Query
from pydantic import BaseModel, Field

from app.access.callers import KeyScope
from app.api import problems
from app.api.callers import InjectedCaller, ListedNamespace, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.governance.signals import store
from app.governance.signals.names import LABELS, SIGNALS, SignalDefinition, SignalKind, Statistic, Unit
from app.governance.signals.rows import DAY, HOUR, MINUTE
from app.governance.signals.sample import WindowValue
from app.governance.signals.store import SignalQuery
from app.kernel.errors import InvalidInput, NotFound, Problem
from app.kernel.units import durations

router = ApiRouter(prefix="/v1/signals", tags=["governance"], dependencies=[requires(KeyScope.READ)])

_RESOLUTIONS: Mapping[str, int] = {"minute": MINUTE, "hour": HOUR, "day": DAY}
_NOW = timedelta(minutes=5)
#: The longest windows that are shown by minute and by hour: those are kept for so long.
_LONGEST = {MINUTE: store.KEPT[MINUTE], HOUR: store.KEPT[HOUR], DAY: store.KEPT[DAY]}


class SignalOut(BaseModel):
    """A signal that is measured."""

    name: str
    kind: SignalKind
    unit: Unit
    labels: list[str] = Field(description="what its observations are about")
    statistics: list[Statistic] = Field(description="what can be asked of it, the default first")
    description: str
    value: float | None = Field(description="its default statistic over the last five minutes; null: nothing observed")


class SignalList(BaseModel):
    """All signals, in the order of the documentation."""

    signals: list[SignalOut]


class SignalValue(BaseModel):
    """The statistics of a window; null where there are no observations for them."""

    group: str = Field(description="the value of the label `by`; empty without it")
    observations: int
    statistics: dict[Statistic, float | None]


class SignalPointOut(BaseModel):
    """A minute, an hour or a day."""

    at: datetime
    group: str
    observations: int
    value: float | None = Field(description="the statistic that was asked for")


class SignalHistory(BaseModel):
    """A signal in a window."""

    name: str
    unit: Unit
    statistic: Statistic
    window: str
    resolution: Literal["minute", "hour", "day"]
    values: list[SignalValue] = Field(description="of the whole window, by the value of the label `by`")
    points: list[SignalPointOut] = Field(description="the oldest first")


@router.get("", summary="List signals", responses=problems.documented())
def page(services: InjectedServices, namespace: ListedNamespace) -> SignalList:
    """All signals that are measured, each with its value now. A caller of a namespace sees those of the namespace."""
    found = []
    with services.database.work() as work:
        for definition in SIGNALS.values():
            if namespace is not None and "namespace" not in definition.labels:
                continue
            where = {"namespace": namespace} if namespace is not None else {}
            value = store.read(work, SignalQuery(definition.name, _NOW, where)).get("")
            current = None if value is None else value.statistic(definition.statistics[0])
            found.append(_described(definition, current))
    return SignalList(signals=found)


@router.get("/{name}", summary="A signal over time", responses=problems.documented(404, 422))
def history(
    name: Annotated[str, Path(description="the name of the signal", examples=["error_rate"])],
    services: InjectedServices,
    caller: InjectedCaller,
    namespace: ListedNamespace,
    window: Annotated[str, Query(description="the time until now", examples=["1h"], max_length=50)] = "1h",
    by: Annotated[str | None, Query(description=f"a label: {', '.join(LABELS)}", max_length=50)] = None,
    statistic: Annotated[Statistic | None, Query(description="of the points; by default that of the signal")] = None,
    resolution: Annotated[Literal["minute", "hour", "day"] | None, Query(description="of the points")] = None,
    model: Annotated[str | None, Query(max_length=200)] = None,
    pool: Annotated[str | None, Query(max_length=200)] = None,
    host: Annotated[str | None, Query(max_length=200)] = None,
    device: Annotated[str | None, Query(max_length=200)] = None,
    priority: Annotated[str | None, Query(max_length=200)] = None,
) -> SignalHistory:
    """
    The statistics of a signal in a window that ends now, and its points by minute, hour or day.

    Minutes are kept for a day, hours for 31 days, days for two years.
    """
    definition = SIGNALS.get(name)
    is_theirs = caller.namespace is None or (definition is not None and "namespace" in definition.labels)
    if definition is None or not is_theirs:
        known = [one.name for one in SIGNALS.values() if caller.namespace is None or "namespace" in one.labels]
        raise NotFound("signal", name, known)
    length = _duration(window)
    if resolution is None:
        resolution = "minute" if length <= timedelta(hours=6) else "hour" if length <= timedelta(days=14) else "day"
    if length > _LONGEST[_RESOLUTIONS[resolution]]:
        longest = durations.show(_LONGEST[_RESOLUTIONS[resolution]])
        raise InvalidInput([Problem("window", f"{window} is longer than points of a {resolution} are kept", longest)])
    chosen = statistic or definition.statistics[0]
    if chosen not in definition.statistics:
        message = f"the signal {name!r} has no {chosen.value!r}"
        raise InvalidInput([Problem("statistic", message, ", ".join(definition.statistics))], "query")
    given = {"model": model, "pool": pool, "host": host, "device": device, "priority": priority, "namespace": namespace}
    query = SignalQuery(name, length, {label: value for label, value in given.items() if value is not None}, by)
    with services.database.work() as work:
        values = store.read(work, query)
        points = store.points(work, query, _RESOLUTIONS[resolution])
    return SignalHistory(
        name=name,
        unit=definition.unit,
        statistic=chosen,
        window=durations.show(length),
        resolution=resolution,
        values=[_value(group, value, definition) for group, value in sorted(values.items())],
        points=[
            SignalPointOut(
                at=point.at,
                group=point.group,
                observations=point.value.observations,
                value=point.value.statistic(chosen),
            )
            for point in points
        ],
    )


def _described(definition: SignalDefinition, value: float | None) -> SignalOut:
    return SignalOut(
        name=definition.name,
        kind=definition.kind,
        unit=definition.unit,
        labels=list(definition.labels),
        statistics=list(definition.statistics),
        description=definition.description,
        value=value,
    )


def _value(group: str, value: WindowValue, definition: SignalDefinition) -> SignalValue:
    return SignalValue(
        group=group,
        observations=value.observations,
        statistics={statistic: value.statistic(statistic) for statistic in definition.statistics},
    )


def _duration(window: str) -> timedelta:
    try:
        return durations.parse(window)
    except ValueError:
        raise InvalidInput([Problem("window", f"{window!r} is not a duration", durations.ACCEPTED)], "query") from None

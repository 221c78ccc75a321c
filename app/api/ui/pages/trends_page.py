"""The page of trends: signals over time as charts, what models did, and what it cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Annotated, Literal

from fastapi import Query, Request
from fastapi.responses import HTMLResponse
from markupsafe import Markup

from app.access.callers import KeyScope
from app.api.callers import InjectedCaller, ListedNamespace, requires
from app.api.governance import signals as signals_resource
from app.api.governance.signals import SignalHistory
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.api.telemetry import models as metrics_resource
from app.api.ui.rendering import render
from app.governance.signals.names import LABELS, SIGNALS, SignalDefinition, Statistic, Unit
from app.kernel.errors import InvalidInput, NotFound, Problem
from app.kernel.units import durations

router = ApiRouter(prefix="/ui", include_in_schema=False, dependencies=[requires(KeyScope.READ)])

#: What can be chosen, and for how long each is kept by what resolution.
_WINDOWS = ("15m", "1h", "6h", "24h", "7d", "31d")
#: The charts of the first view, with the statistic of each and its label where none is chosen.
_SHOWN: Mapping[str, tuple[str, Statistic, str]] = {
    "response_time": ("Time of answers", Statistic.P95, "model"),
    "first_token_time": ("Time to the first token", Statistic.P95, "model"),
    "queue_wait": ("Time in queues", Statistic.P95, "model"),
    "tokens": ("Tokens", Statistic.SUM, "model"),
    "memory_reserved": ("Memory that is reserved", Statistic.MEAN, "device"),
    "memory_utilisation": ("Memory that is used", Statistic.MEAN, "device"),
    "gpu_utilisation": ("GPUs that compute", Statistic.MEAN, "device"),
    "steps_per_load": ("Steps for each load of a model", Statistic.MEAN, "model"),
    "error_rate": ("Failed attempts", Statistic.MEAN, "model"),
    "cost": ("Cost", Statistic.SUM, "namespace"),
}
#: Most lines of a chart; the largest are shown.
_MOST_LINES = 8


@dataclass(frozen=True, slots=True)
class TrendRow:
    """A row of the table below a chart."""

    group: str
    observations: int
    values: Sequence[str]


@dataclass(frozen=True, slots=True)
class Chart:
    """A signal in a window, ready to be drawn."""

    name: str
    title: str
    description: str
    statistic: str
    #: The statistic over all, in words.
    shown: str
    #: The names of the lines; empty: nothing was observed.
    series: Sequence[str]
    #: What the script draws.
    data: Markup = field(default_factory=Markup)
    statistics: Sequence[str] = ()
    rows: Sequence[TrendRow] = ()


@router.get("/trends")
def trends(
    request: Request,
    caller: InjectedCaller,
    services: InjectedServices,
    namespace: ListedNamespace,
    window: Literal["15m", "1h", "6h", "24h", "7d", "31d"] = "1h",
    by: Annotated[str, Query(max_length=20)] = "",
    signal: Annotated[str, Query(max_length=100)] = "",
) -> HTMLResponse:
    """Charts of signals, the table of models, and costs by namespace."""
    if by and by not in LABELS:
        raise InvalidInput([Problem("query.by", f"{by!r} is no label", ", ".join(LABELS))], "query")
    able = [one for one in SIGNALS.values() if caller.namespace is None or "namespace" in one.labels]
    if signal and signal not in {one.name for one in able}:
        raise NotFound("signal", signal, [one.name for one in able])
    names = [signal] if signal else [name for name in _SHOWN if name in {one.name for one in able}]
    charts = []
    for name in names:
        lines = _history(services, caller, namespace, name, window, by)
        whole = signals_resource.history(name, services, caller, namespace, window, None, lines.statistic)
        charts.append(chart_of(SIGNALS[name], lines, whole, _title(name)))
    length = durations.parse(window)
    costs = signals_resource.history("cost", services, caller, namespace, window, "namespace")
    return render(
        request,
        caller,
        "trends.html",
        title="Trends",
        seconds=seconds,
        window=window,
        windows=_WINDOWS,
        by=by,
        labels=[label for label in LABELS if any(label in one.labels for one in able)],
        only=signal,
        charts=charts,
        any_points=any(chart.series for chart in charts),
        metrics=metrics_resource.models(services, namespace, last=max(length, timedelta(minutes=5))).models,
        costs=[
            {
                "group": one.group,
                "cost": in_words(one.statistics[Statistic.SUM], Unit.CURRENCY),
                "observations": one.observations,
            }
            for one in costs.values
            if one.statistics[Statistic.SUM]
        ],
    )


def _history(
    services: InjectedServices, caller: InjectedCaller, namespace: str | None, name: str, window: str, by: str
) -> SignalHistory:
    definition = SIGNALS[name]
    _, statistic, usual = _SHOWN.get(name, ("", definition.statistics[0], ""))
    label = by or usual
    chosen = label if label in definition.labels else None
    return signals_resource.history(name, services, caller, namespace, window, chosen, statistic)


def _title(name: str) -> str:
    return _SHOWN[name][0] if name in _SHOWN else name.replace("_", " ").capitalize()


def chart_of(definition: SignalDefinition, found: SignalHistory, whole: SignalHistory, title: str) -> Chart:
    """Return the chart of a signal: its lines over the same instants, the ones with most observations."""
    ordered = sorted(found.values, key=lambda one: -one.observations)
    groups = [one.group for one in ordered[:_MOST_LINES]]
    instants = sorted({point.at for point in found.points})
    by_place = {(point.group, point.at): point.value for point in found.points}
    lines = [
        {
            "label": group or title,
            "values": [_rounded(by_place.get((group, at))) for at in instants],
        }
        for group in groups
    ]
    data = {
        "times": [at.timestamp() for at in instants],
        "seconds": durations.parse(found.window).total_seconds(),
        "unit": definition.unit,
        "series": lines,
    }
    shown = whole.values[0].statistics[found.statistic] if whole.values else None
    return Chart(
        definition.name,
        title,
        definition.description,
        found.statistic,
        in_words(shown, definition.unit),
        groups if instants else [],
        # It stands in an element of the page: `<` would end that.
        Markup(json.dumps(data).replace("<", "\\u003c")),  # noqa: S704 JSON without an opening bracket of markup
        list(definition.statistics),
        [
            TrendRow(
                one.group or "all",
                one.observations,
                [_cell(one.statistics[statistic], statistic, definition.unit) for statistic in definition.statistics],
            )
            for one in ordered
        ],
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _cell(value: float | None, statistic: Statistic, unit: Unit) -> str:
    return in_words(value, Unit.STEPS if statistic is Statistic.COUNT else unit)


def in_words(value: float | None, unit: Unit) -> str:
    """Return a value of a signal with its unit."""
    if value is None:
        return "\N{EN DASH}"
    match unit:
        case Unit.RATIO:
            return f"{value * 100:.1f} %"
        case Unit.SECONDS:
            return seconds(value)
        case Unit.CURRENCY:
            return f"{value:,.4f}" if value < 1 else f"{value:,.2f}"
        case _:
            return f"{value:,.0f}" if value == int(value) or value > 100 else f"{value:,.2f}"


def seconds(value: float | None) -> str:
    """Return a time in words: 12 ms, 3.4 s, 5 min."""
    if value is None:
        return "\N{EN DASH}"
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:,.0f} min" if value < 7200 else f"{value / 3600:,.1f} h"

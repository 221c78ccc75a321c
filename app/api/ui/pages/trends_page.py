"""The page of trends: signals over time as charts, what models did, and what it cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Annotated, Literal, NamedTuple

from fastapi import Query, Request
from fastapi.responses import HTMLResponse
from markupsafe import Markup

from app.access.callers import KeyScope
from app.api.callers import InjectedCaller, ListedNamespace, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.api.telemetry import models as metrics_resource
from app.api.ui.rendering import render
from app.governance.signals import charts
from app.governance.signals.charts import ChartLine, ChartWanted
from app.governance.signals.names import LABELS, SIGNALS, SignalDefinition, Statistic, Unit
from app.kernel.errors import InvalidInput, NotFound, Problem
from app.kernel.units import durations

router = ApiRouter(prefix="/ui", include_in_schema=False, dependencies=[requires(KeyScope.READ)])

#: What can be chosen, and the time between two points of a chart.
_WINDOWS: Mapping[str, timedelta] = {
    "15m": timedelta(minutes=1),
    "1h": timedelta(minutes=1),
    "6h": timedelta(minutes=5),
    "24h": timedelta(hours=1),
    "7d": timedelta(hours=1),
    "31d": timedelta(days=1),
}


class UsualChart(NamedTuple):
    """How a signal is shown where nothing else is chosen."""

    title: str
    statistic: Statistic
    label: str


#: The charts of the first view, with the statistic of each and its label where none is chosen.
_SHOWN: Mapping[str, UsualChart] = {
    "response_time": UsualChart("Time of answers", Statistic.P95, "model"),
    "first_token_time": UsualChart("Time to the first token", Statistic.P95, "model"),
    "queue_wait": UsualChart("Time in queues", Statistic.P95, "model"),
    "tokens": UsualChart("Tokens", Statistic.SUM, "model"),
    "memory_reserved": UsualChart("Memory that is reserved", Statistic.MEAN, "device"),
    "memory_utilisation": UsualChart("Memory that is used", Statistic.MEAN, "device"),
    "gpu_utilisation": UsualChart("GPUs that compute", Statistic.MEAN, "device"),
    "steps_per_load": UsualChart("Steps for each load of a model", Statistic.MEAN, "model"),
    "error_rate": UsualChart("Failed attempts", Statistic.MEAN, "model"),
    "cost": UsualChart("Cost", Statistic.SUM, "namespace"),
}
#: Most lines of a chart: those with most observations.
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
    #: The label of its lines; None: one line for all.
    label: str | None
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
    able = [one for one in SIGNALS.values() if namespace is None or "namespace" in one.labels]
    if signal and signal not in {one.name for one in able}:
        raise NotFound("signal", signal, [one.name for one in able])
    names = [signal] if signal else [name for name in _SHOWN if name in {one.name for one in able}]
    length = durations.parse(window)
    wanted = [ChartWanted(name, _label(name, by)) for name in names]
    with services.database.work() as work:
        # Costs by namespace are those of the table below the charts.
        read = charts.read(
            work, [*wanted, ChartWanted("cost", "namespace")], length, _WINDOWS[window], namespace, _MOST_LINES
        )
    drawn = [chart_of(SIGNALS[one.signal], one.by, lines, length) for one, lines in zip(wanted, read, strict=False)]
    return render(
        request,
        caller,
        "trends.html",
        title="Trends",
        seconds=seconds,
        window=window,
        windows=list(_WINDOWS),
        by=by,
        labels=[label for label in LABELS if any(label in one.labels for one in able)],
        only=signal,
        charts=drawn,
        any_points=any(chart.series for chart in drawn),
        metrics=metrics_resource.models(services, namespace, last=max(length, timedelta(minutes=5))).models,
        costs=[
            {
                "group": line.group,
                "cost": in_words(line.value.statistic(Statistic.SUM), Unit.CURRENCY),
                "observations": line.value.observations,
            }
            for line in sorted(read[-1], key=lambda line: line.group)
            if line.value.statistic(Statistic.SUM)
        ],
    )


def _label(name: str, by: str) -> str | None:
    """Return the label by which a signal is shown: the chosen one, else its usual one, if it has that."""
    usual = _SHOWN[name].label if name in _SHOWN else ""
    return label if (label := by or usual) in SIGNALS[name].labels else None


def _statistic(definition: SignalDefinition) -> Statistic:
    return _SHOWN[definition.name].statistic if definition.name in _SHOWN else definition.statistics[0]


def _title(name: str) -> str:
    return _SHOWN[name].title if name in _SHOWN else name.replace("_", " ").capitalize()


def chart_of(definition: SignalDefinition, label: str | None, lines: Sequence[ChartLine], window: timedelta) -> Chart:
    """Return the chart of a signal: those of its lines that have points, over the same instants."""
    statistic, title = _statistic(definition), _title(definition.name)
    with_points = [line for line in lines if line.points]
    instants = sorted({at for line in with_points for at, _ in line.points})
    drawn = []
    for line in with_points:
        values = {at: value.statistic(statistic) for at, value in line.points}
        drawn.append({"label": line.group or title, "values": [_rounded(values.get(at)) for at in instants]})
    data = {"times": instants, "seconds": window.total_seconds(), "unit": definition.unit, "series": drawn}
    shown = charts.together(lines, window).statistic(statistic) if lines else None
    return Chart(
        definition.name,
        title,
        definition.description,
        label,
        statistic,
        in_words(shown, definition.unit),
        [line.group for line in with_points],
        # It stands in an element of the page: `<` would end that.
        Markup(json.dumps(data).replace("<", "\\u003c")),  # noqa: S704 JSON without an opening bracket of markup
        list(definition.statistics),
        [
            TrendRow(
                line.group or "all",
                line.value.observations,
                [_cell(line.value.statistic(one), one, definition.unit) for one in definition.statistics],
            )
            for line in lines
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

"""Where things are drawn: the graph of a run, and its steps over time. Sizes are in the units of an SVG's view box."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from app.api.workflows.run_documents import RunOut, StepOut

#: The box of a step, and the distances between boxes.
_WIDTH, _HEIGHT, _ACROSS, _DOWN, _MARGIN = 176, 50, 56, 16, 6
#: The width of the drawing of times.
SPAN = 1000.0


@dataclass(frozen=True, slots=True)
class GraphBox:
    """A step in the graph."""

    step: StepOut
    x: int
    y: int


@dataclass(frozen=True, slots=True)
class RunGraph:
    """The steps of a run from left to right, each behind those that it needs."""

    width: int
    height: int
    boxes: Sequence[GraphBox]
    #: The curves between steps, with the state of the step where each begins.
    edges: Sequence[tuple[str, str]]
    box_width: int = _WIDTH
    box_height: int = _HEIGHT


@dataclass(frozen=True, slots=True)
class Bar:
    """A stretch of time of a step."""

    begin: float
    width: float
    #: `waited`, or what became of the attempt.
    kind: str
    title: str


@dataclass(frozen=True, slots=True)
class GanttRow:
    """The stretches of one step."""

    step: StepOut
    bars: Sequence[Bar]


def graph_of(steps: Sequence[StepOut]) -> RunGraph:
    """Return the graph of a run's steps."""
    known = {step.key for step in steps}
    needs = {step.key: [name for one in step.needs if (name := one.partition(".")[0]) in known] for step in steps}
    layers = _layers(needs)
    columns: dict[int, list[StepOut]] = {}
    for step in steps:
        columns.setdefault(layers[step.key], []).append(step)
    row: dict[str, float] = {}
    for layer in sorted(columns):
        of = columns[layer]
        # Below each other in the order of those that they need, so that fewer edges cross.
        of.sort(key=lambda step: sum(row[one] for one in needs[step.key]) / max(len(needs[step.key]), 1))
        row.update({step.key: index for index, step in enumerate(of)})
    tallest = max((len(of) for of in columns.values()), default=0)
    place: dict[str, GraphBox] = {}
    for layer, of in columns.items():
        top = _MARGIN + (tallest - len(of)) * (_HEIGHT + _DOWN) // 2
        for index, step in enumerate(of):
            x, y = _MARGIN + layer * (_WIDTH + _ACROSS), top + index * (_HEIGHT + _DOWN)
            place[step.key] = GraphBox(step, x, y)
    edges = [
        (_curve(place[one], place[key]), str(place[one].step.state))
        for key, of_step in needs.items()
        for one in of_step
    ]
    width = 2 * _MARGIN + len(columns) * (_WIDTH + _ACROSS) - _ACROSS
    return RunGraph(
        max(width, 0), 2 * _MARGIN + tallest * (_HEIGHT + _DOWN) - _DOWN, [place[s.key] for s in steps], edges
    )


def gantt_of(run: RunOut, now: datetime) -> Sequence[GanttRow]:
    """Return the steps of a run over time, those that have begun."""
    end = max([run.finished_at or now, *(step.finished_at for step in run.steps if step.finished_at)])
    whole = max((end - run.created_at) / timedelta(seconds=1), 0.001)

    def bar(begin: datetime, until: datetime, kind: str, title: str) -> Bar:
        first = max((begin - run.created_at).total_seconds(), 0) / whole * SPAN
        last = max((until - run.created_at).total_seconds(), 0) / whole * SPAN
        return Bar(round(first, 1), round(max(last - first, 2), 1), kind, title)

    rows = []
    for step in run.steps:
        bars = []
        if step.ready_at:
            until = step.started_at or step.finished_at or end
            bars.append(bar(step.ready_at, until, "waited", f"waited {in_words(until - step.ready_at)}"))
        if step.started_at and not step.attempts:
            until = step.finished_at or end
            bars.append(bar(step.started_at, until, str(step.state), f"took {in_words(until - step.started_at)}"))
        elif step.started_at and (step.finished_at or end) > (last := step.attempts[-1].finished_at or end):
            # After its own attempts it waited for an event, its items or a called run.
            until = step.finished_at or end
            bars.append(bar(last, until, "awaiting", f"waited for others {in_words(until - last)}"))
        for one in step.attempts:
            until = one.finished_at or end
            kind = "running" if one.outcome is None else "failed" if one.message else "succeeded"
            bars.append(bar(one.started_at, until, kind, f"attempt {one.attempt}: {in_words(until - one.started_at)}"))
        if bars:
            rows.append(GanttRow(step, bars))
    return rows


def in_words(span: timedelta | float | None) -> str:
    """Return a span as people say it: `1.4 s`, `3 min 20 s`, `2 h 5 min`."""
    if span is None:
        return "-"
    seconds = span.total_seconds() if isinstance(span, timedelta) else span
    if seconds < 1:
        return f"{max(seconds, 0) * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _layers(needs: Mapping[str, Sequence[str]]) -> Mapping[str, int]:
    """By step, the length of the longest way to it. Steps come in any order; there are no circles."""
    layers: dict[str, int] = {}
    for key in needs:
        stack = [key]
        while stack:
            here = stack[-1]
            missing = [one for one in needs[here] if one not in layers]
            if missing and len(stack) <= len(needs):
                stack.extend(missing)
                continue
            layers[here] = max((layers.get(one, 0) + 1 for one in needs[here]), default=0)
            stack.pop()
    return layers


def _curve(begin: GraphBox, end: GraphBox) -> str:
    x1, y1 = begin.x + _WIDTH, begin.y + _HEIGHT // 2
    x2, y2 = end.x, end.y + _HEIGHT // 2
    return f"M{x1} {y1}C{x1 + _ACROSS // 2} {y1} {x2 - _ACROSS // 2} {y2} {x2} {y2}"

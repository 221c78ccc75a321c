"""
The forecast of a run: its expected time and that of its steps, from its definition, what was learned, and the queues.

The time is that of the timeline of its steps, corrected by how wrong earlier predictions of its workflow were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from app.inference.prediction.history import NEW_STEP, ModelHistory, StepHistory, WorkflowHistory
from app.inference.prediction.residuals import Interval, Residuals
from app.inference.prediction.timeline import ExpectedStep, ModelSlots, timeline
from app.workflows.language.definition import Definition, needs_of
from app.workflows.language.steps import MODEL_KINDS, AgentStep, AnyStep, MapStep, WaitStep, work_of

#: Items of a map of which nothing is known, and the seconds of a step that computes only.
_ITEMS, _INSTANT = 10.0, 0.02
#: The kinds of steps that compute only.
_INSTANT_KINDS = ("transform", "join", "switch", "noop")
#: The least part of its expected time that a running step still needs.
_LEAST_LEFT = 0.1
#: Most items of a map that are counted.
_MOST_ITEMS = 10_000_000


class Basis(StrEnum):
    """What a forecast was made of."""

    #: Each step was seen before.
    HISTORY = "history"
    #: Some were.
    PARTLY = "partly"
    #: None was: times are defaults.
    DEFAULTS = "defaults"


@dataclass(frozen=True, slots=True)
class Learned:
    """What is known at the time of a forecast."""

    workflow: WorkflowHistory
    models: Mapping[str, ModelHistory] = field(default_factory=dict)
    slots: Mapping[str, ModelSlots] = field(default_factory=dict)
    #: Residuals of runs of workflows without enough of their own, by basis.
    groups: Mapping[Basis, Residuals] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepProgress:
    """How far a step has come that has not ended."""

    #: Seconds since it began; None before.
    elapsed: float | None = None
    #: Tokens that it has written; None when that is not known.
    written: int | None = None
    #: For a map that has begun: items that have not ended.
    items_left: int | None = None
    #: Seconds until its wait ends or its next attempt begins.
    due_in: float | None = None


@dataclass(frozen=True, slots=True)
class Forecast:
    """The expected time of a run, or of what is left of it."""

    #: Seconds before the correction.
    raw: float
    interval: Interval
    basis: Basis
    #: Of one execution of each step in it; for a map, of one item.
    steps: Mapping[str, Interval] = field(default_factory=dict)
    #: Whether enough runs of this workflow were predicted before.
    is_calibrated: bool = False


#: No step has begun.
NOTHING_DONE: Mapping[str, StepProgress] = {}


def forecast(
    definition: Definition,
    learned: Learned,
    inputs_bytes: int,
    progress: Mapping[str, StepProgress] = NOTHING_DONE,
    ended: frozenset[str] = frozenset(),
) -> Forecast:
    """Return the forecast of a run of the definition, or of what is left of it."""
    expected: list[ExpectedStep] = []
    intervals: dict[str, Interval] = {}
    known = unknown = 0
    for step in definition.steps:
        if step.id in ended:
            continue
        history = learned.workflow.steps.get(step.id, NEW_STEP)
        model = _model_of(definition, step)
        seconds = _seconds(step, history, learned.models.get(model or ""), inputs_bytes)
        if step.kind not in _INSTANT_KINDS and not _is_timed(step):
            known, unknown = known + history.is_known, unknown + (not history.is_known)
        intervals[step.id] = history.interval(seconds, None if model is None else learned.models.get(model))
        now = progress.get(step.id, StepProgress())
        expected.append(_expected(step, history, seconds, model, now, inputs_bytes, learned))
    raw = timeline(expected, learned.slots).seconds
    basis = Basis.HISTORY if not unknown else Basis.PARTLY if known else Basis.DEFAULTS
    own = learned.workflow.residuals
    residuals = own if own.is_enough else learned.groups.get(basis, own)
    return Forecast(raw, residuals.around(raw), basis, intervals, own.is_enough)


def as_stored(found: Forecast, warning: str | None = None) -> dict[str, Any]:
    """Return a forecast as it is stored with its run."""
    interval = found.interval
    figures = {"seconds": interval.seconds, "low": interval.low, "high": interval.high, "raw": found.raw}
    stored: dict[str, Any] = {name: round(value, 3) for name, value in figures.items()}
    return {**stored, "basis": str(found.basis), **({"warning": warning} if warning else {})}


def _model_of(definition: Definition, step: AnyStep) -> str | None:
    """Return the model whose slots a step takes; an agent takes one only now and then."""
    work = work_of(step)
    if isinstance(step, AgentStep) or not isinstance(work, MODEL_KINDS):
        return None
    return definition.models_of(work)[0]


def _seconds(step: AnyStep, history: StepHistory, model: ModelHistory | None, inputs_bytes: int) -> float:
    if isinstance(step, WaitStep) and step.for_ is not None:
        return step.for_.total_seconds()
    if step.kind in _INSTANT_KINDS and not history.is_known:
        return _INSTANT
    return history.expected(inputs_bytes, model)


def _is_timed(step: AnyStep) -> bool:
    return isinstance(step, WaitStep) and step.for_ is not None


def _expected(
    step: AnyStep,
    history: StepHistory,
    seconds: float,
    model: str | None,
    now: StepProgress,
    inputs_bytes: int,
    learned: Learned,
) -> ExpectedStep:
    needs = tuple(key for key, _ in needs_of(step))
    if isinstance(step, MapStep):
        items = history.items.at(inputs_bytes) if history.items.weight else _ITEMS
        count = now.items_left if now.items_left is not None else round(items)
        return ExpectedStep(step.id, needs, seconds, model, min(max(count, 0), _MOST_ITEMS), step.max_parallel)
    if now.due_in is not None:
        return ExpectedStep(step.id, needs, now.due_in + (0.0 if _is_timed(step) else seconds), runs=True)
    if now.elapsed is not None:
        left = seconds - now.elapsed
        of = learned.models.get(model or "")
        if now.written and of is not None and of.is_known and history.tokens_out.weight:
            left = (history.tokens_out.at(inputs_bytes) - now.written) * of.per_token
        return ExpectedStep(step.id, needs, max(left, seconds * _LEAST_LEFT), runs=True)
    share = history.share.mean if history.share.weight else 1.0
    return ExpectedStep(step.id, needs, seconds * share, model)

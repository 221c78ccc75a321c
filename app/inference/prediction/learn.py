"""
Learning: a run that has ended changes what is known of its workflow, of its models and of the predictions.

Each prediction is compared before its truth is learned, so that a residual is that of a run that was not yet known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from app.inference.prediction.forecast import Basis
from app.inference.prediction.history import (
    MOST_STEPS,
    NEW_STEP,
    ModelHistory,
    StepHistory,
    StepSample,
    WorkflowHistory,
)
from app.inference.prediction.residuals import Interval, Residuals


@dataclass(frozen=True, slots=True)
class EndedStep:
    """A step of a run that has ended."""

    key: str
    #: It was executed, and succeeded.
    was_done: bool
    #: It was skipped by a condition or a branch.
    was_skipped: bool = False
    #: What it has used; for a map, some of its items; none for what never ended well.
    samples: Sequence[StepSample] = ()
    #: The items of a map.
    items: int | None = None


@dataclass(frozen=True, slots=True)
class EndedRun:
    """A run that has succeeded."""

    inputs_bytes: int
    #: Seconds from its submission to its end; None where it was paused.
    seconds: float | None
    #: Its forecast at its submission, as it was stored.
    expected: Mapping[str, Any] | None
    steps: Sequence[EndedStep]


@dataclass(slots=True)
class Knowledge:
    """What is known of one workflow, of the models that it uses, and of predictions of new workflows."""

    workflow: WorkflowHistory
    models: dict[str, ModelHistory] = field(default_factory=dict)
    groups: dict[Basis, Residuals] = field(default_factory=dict)


def learn(knowledge: Knowledge, run: EndedRun) -> None:
    """Add a run to what is known."""
    steps = dict(knowledge.workflow.steps)
    for step in run.steps:
        if step.key not in steps and len(steps) >= MOST_STEPS:
            continue
        steps[step.key] = _with(steps.get(step.key, NEW_STEP), step, run.inputs_bytes, knowledge.models)
    residuals = knowledge.workflow.residuals
    if run.expected is not None and run.seconds is not None:
        raw, given = float(run.expected["raw"]), _interval(run.expected)
        basis = Basis(run.expected["basis"])
        if not residuals.is_enough:
            knowledge.groups[basis] = knowledge.groups.get(basis, Residuals()).add(raw, run.seconds, given)
        # The shares that are left out are those of this workflow only once its own residuals were used.
        residuals = residuals.add(raw, run.seconds, given if residuals.is_enough else None)
    knowledge.workflow = WorkflowHistory(steps, residuals)


def _with(history: StepHistory, step: EndedStep, inputs_bytes: int, models: dict[str, ModelHistory]) -> StepHistory:
    if step.was_done or step.was_skipped:
        history = replace(history, share=history.share.add(float(step.was_done)))
    if step.items is not None:
        history = replace(history, items=history.items.add(inputs_bytes, step.items))
    for sample in step.samples:
        model = None if sample.model is None else models.get(sample.model, ModelHistory())
        predicted = history.expected(inputs_bytes, model) if history.is_known else None
        given = Interval(0.0, 0.0, 0.0) if predicted is None else history.interval(predicted, model)
        if model is not None and sample.model is not None:
            if predicted is not None:
                model = replace(model, residuals=model.residuals.add(predicted, sample.seconds, given))
            models[sample.model] = model.add(sample)
        history = history.add(inputs_bytes, sample, predicted, given)
    return history


def _interval(stored: Mapping[str, Any]) -> Interval:
    return Interval(float(stored["seconds"]), float(stored["low"]), float(stored["high"]))

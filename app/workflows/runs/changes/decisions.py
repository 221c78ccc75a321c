"""
Decisions: results of a workflow's own expressions during a run.

They decide whether a step begins, which branch a switch takes, whether another attempt is made, and the run's output.
Every error of such an expression becomes a StepFailure with the reason: it fails one step or one run, and never leaves
the transaction that decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from app.kernel import log
from app.kernel.errors import FailureReason, StepFailure
from app.workflows.expressions import conditions
from app.workflows.language import outputs
from app.workflows.language.definition import Definition
from app.workflows.language.steps import AnyStep, SwitchStep

_log = log.get(__name__)


@contextmanager
def evaluating() -> Iterator[None]:
    """Evaluate expressions of a workflow. Every error in the block is raised as StepFailure."""
    try:
        yield
    except StepFailure:
        raise
    except Exception as error:
        _log.exception("evaluation_failed")
        reason = f"it cannot be evaluated: {type(error).__name__}: {error}"
        raise StepFailure(FailureReason.TEMPLATE_ERROR, reason) from error


def holds(step: AnyStep, data: Mapping[str, Any]) -> bool:
    """Whether the condition of a step holds; True without one. Raises StepFailure."""
    with evaluating():
        return step.when is None or conditions.evaluate_bool(step.when, data)


def branch(step: SwitchStep, data: Mapping[str, Any]) -> str | None:
    """The branch that a switch takes. Raises StepFailure."""
    with evaluating():
        return next((name for name, case in step.cases.items() if conditions.evaluate_bool(case, data)), step.default)


def retryable(condition: str, error: Mapping[str, Any]) -> bool:
    """Whether the condition of a retry rule holds for an error. Raises StepFailure."""
    seen = {name: error[name] for name in ("reason", "message", "attempt")}
    with evaluating():
        return conditions.evaluate_bool(condition, {"inputs": {}, "steps": {}, "error": seen})


def output(definition: Definition, data: Mapping[str, Any], keys: Iterator[str]) -> dict[str, Any]:
    """The output of a run: that of its `outputs`, or without these the outputs of its steps. Raises StepFailure."""
    if not definition.outputs:
        return {key: data["steps"][key]["output"] for key in keys if key in data["steps"]}
    with evaluating():
        return outputs.compute(definition.output_parts(), data)

"""The expected time in a slot of each step that waits for a model, for the estimates of waiting calls."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.inference.prediction import store
from app.inference.prediction.history import ModelHistory, WorkflowHistory
from app.kernel.database import UnitOfWork

#: Workflows whose steps are told apart, those with the most waiting steps; the others take the mean time.
_MOST_WORKFLOWS = 20


@dataclass(frozen=True, slots=True)
class ExpectedWork:
    """What is known of the workflows and the models of waiting steps."""

    workflows: Mapping[tuple[str, str], WorkflowHistory]
    models: Mapping[str, ModelHistory]

    def seconds(self, steps: Sequence[Any], mean: float) -> tuple[float, ...]:
        """Return the expected seconds of waiting steps: rows with model, namespace, workflow, key and inputs_bytes."""
        return tuple(self._of(row, mean) for row in steps)

    def spread(self, model: str) -> tuple[float, float] | None:
        """Return the factors of the expected time between which 80 % of a model's steps are; None: too few ended."""
        residuals = self.models.get(model, ModelHistory()).residuals
        if not residuals.is_enough:
            return None
        found = residuals.around(1.0)
        return found.low, found.high

    def _of(self, row: Any, mean: float) -> float:
        workflow = self.workflows.get((row.namespace, row.workflow))
        step = None if workflow is None else workflow.steps.get(row.key.partition("[")[0])
        if step is None or not step.is_known:
            return mean
        return step.expected(row.inputs_bytes, self.models.get(row.model))


def read(work: UnitOfWork, steps: Sequence[Any], models: Collection[str]) -> ExpectedWork:
    """Read what is known of the workflows with the most waiting steps, and of the models."""
    counted = Counter((row.namespace, row.workflow) for row in steps)
    names: dict[str, list[str]] = defaultdict(list)
    for (namespace, workflow), _ in counted.most_common(_MOST_WORKFLOWS):
        names[namespace].append(workflow)
    found = {
        (namespace, name): WorkflowHistory.of(state)
        for namespace, of in names.items()
        for name, state in store.read(work, "workflow", of, namespace).items()
    }
    return ExpectedWork(found, {name: ModelHistory.of(one) for name, one in store.read(work, "model", models).items()})

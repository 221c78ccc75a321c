"""The data of a run for its expressions and templates: its inputs, its steps, and the values of this transaction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.workflows.language.graph import Reads
from app.workflows.runs.changes.transactions import RunTransaction
from app.workflows.runs.storage import values
from app.workflows.runs.storage.payloads import as_json
from app.workflows.runs.storage.selected import LockedRun
from app.workflows.state_machine.run import Run
from app.workflows.state_machine.states import StepState


class RunData:
    """What is stored of a run is read when it is needed."""

    def __init__(self, transaction: RunTransaction, locked: LockedRun, inputs: Mapping[str, Any] | None) -> None:
        self._transaction, self._locked, self._inputs = transaction, locked, inputs
        self._values: dict[str, Any] = {}
        #: The outputs of this transaction as JSON, by step.
        self.texts: dict[str, str] = {}
        #: Which outputs were read last, and what they are: switches in a row often read the same.
        self._read: tuple[tuple[list[str], set[str]], dict[str, dict[str, Any]]] | None = None

    def put(self, key: str, output: Any, text: str | None = None) -> None:
        """Take the output of a step. `text` is the output as JSON, where the caller has it."""
        self._values[key] = output
        self.texts[key] = as_json(output) if text is None else text

    def of(
        self, reads: Reads, run: Run, errors: Mapping[str, Mapping[str, Any]], finish_reasons: Mapping[str, str]
    ) -> dict[str, Any]:
        """
        The data for a text that reads these parts of the run. `errors` and `finish_reasons` are those of this
        transaction.

        Raises StepFailure when that is too much.
        """
        work, run_id = self._transaction.work, self._locked.id
        if self._inputs is None and reads.inputs:
            self._inputs = values.inputs(work, run_id)
        stored = [key for key in reads.steps if key not in self._values]
        succeeded = {key for key in stored if run.steps[key].state is StepState.SUCCEEDED}
        if self._read is None or self._read[0] != (stored, succeeded):
            found = values.outputs(work, run_id, stored, self._transaction.policy.limits.read, succeeded)
            self._read = ((stored, succeeded), found)
        found = self._read[1]
        steps = {}
        for key in reads.steps:
            earlier = found.get(key, {"output": None, "error": None, "finish_reason": None})
            steps[key] = {
                "state": run.steps[key].state.value,
                "output": self._values[key] if key in self._values else earlier["output"],
                "error": errors.get(key) or earlier["error"],
                "finish_reason": finish_reasons.get(key) or earlier["finish_reason"],
            }
        state = run.ending or run.state
        about = {"id": run.id, "workflow": self._locked.workflow, "state": state.value}
        return {"inputs": dict(self._inputs or {}), "steps": steps, "run": about}

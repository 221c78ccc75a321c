"""Forks: a finished run is repeated from a step on, as a new run that takes the outputs of the earlier steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.kernel.database import UnitOfWork
from app.kernel.errors import InvalidTransition, NotFound
from app.workflows.language import definition as definitions
from app.workflows.runs import submission
from app.workflows.runs.service import Runs
from app.workflows.runs.storage import graphs, payloads
from app.workflows.runs.submission import Accepted, Submission
from app.workflows.state_machine.states import FINAL_RUNS

# Locked, so that its rows are not removed before they are copied.
_SOURCE = text("""
    SELECT namespace, workflow, version, sha256, state, priority, rank, labels, inputs, inputs_sha256 FROM run
    WHERE id = :id FOR KEY SHARE
""")
_COPY_STEPS = text("""
    UPDATE step AS copy SET state = 'succeeded', output = old.output, output_sha256 = old.output_sha256,
                            output_bytes = old.output_bytes, finish_reason = old.finish_reason, error = old.error,
                            branch = old.branch, attempt = old.attempt, ready_at = now(), started_at = now(),
                            finished_at = now()
    FROM step AS old
    WHERE copy.run_id = :run_id AND old.run_id = :old_id AND old.key = copy.key AND old.parent_id IS NULL
      AND old.key = ANY(:keys) AND old.state = 'succeeded'
    RETURNING copy.key
""")
_COPY_ITEMS = text("""
    INSERT INTO step (id, run_id, parent_id, item, input, input_sha256, input_bytes, key, position, kind, model,
                      model_index, queue, priority, rank, state, delegated, attempt, failures, losses, tokens_in,
                      tokens_out, output, output_sha256, output_bytes, finish_reason, error, branch, finished_at)
    SELECT gen_random_uuid(), :run_id, copy.id, old.item, old.input, old.input_sha256, old.input_bytes, old.key,
           old.position, old.kind, old.model, old.model_index, old.queue, copy.priority, copy.rank, old.state, false,
           old.attempt, 0, 0, 0, 0, old.output, old.output_sha256, old.output_bytes, old.finish_reason, old.error,
           old.branch, now()
    FROM step AS old JOIN step AS map ON map.id = old.parent_id
                     JOIN step AS copy ON copy.run_id = :run_id AND copy.key = map.key
    WHERE old.run_id = :old_id AND map.key = ANY(:keys)
""")
_COPY_FAN_OUTS = text("""
    INSERT INTO fan_out (step_id, total, waiting, in_flight, failed, stopping, truncated)
    SELECT copy.id, total, 0, 0, failed, false, truncated
    FROM fan_out JOIN step AS map ON map.id = fan_out.step_id
                 JOIN step AS copy ON copy.run_id = :run_id AND copy.key = map.key
    WHERE map.run_id = :old_id AND map.key = ANY(:keys)
""")


@dataclass(frozen=True, slots=True)
class _Source:
    namespace: str
    workflow: str
    version: int | None
    sha256: str
    state: str
    priority: str
    rank: int
    labels: dict[str, str]
    inputs: Any
    inputs_sha256: str | None


def fork(runs: Runs, run_id: UUID, step: str, inputs: Mapping[str, Any]) -> Accepted:
    """
    Repeat a finished run from a step on: that step and all that come after it. The others keep their outputs.

    `inputs` replace those of the same names. Raises NotFound, Conflict when the run has not ended, InvalidInput.
    """
    with runs.transaction() as transaction:
        work = transaction.work
        rows = payloads.filled(work, work.rows_of(_Source, _SOURCE, {"id": run_id}), "inputs")
        if not rows:
            raise NotFound("run", str(run_id))
        (source,) = rows
        if source.state not in FINAL_RUNS:
            raise InvalidTransition(f"run {run_id}", source.state, "fork")
        graph = graphs.of(work, source.sha256)
        regular = [one.id for one in graph.definition.steps]
        if step not in regular:
            raise NotFound("step", step, regular)
        before = definitions.ancestors(graph.definition)
        kept = [key for key in regular if key != step and step not in before[key]]
        request = Submission(
            graph.definition,
            {**source.inputs, **inputs},
            source.version,
            source.priority,
            rank=source.rank,
            labels=submission.own_labels(source.labels),
            namespace=source.namespace,
        )
        prepared = submission.prepare(request, transaction.policy, forked_from=run_id)

        def copy(new_id: UUID, work: UnitOfWork) -> None:
            of = {"run_id": new_id, "old_id": run_id, "keys": kept}
            copied = [row.key for row in work.rows(_COPY_STEPS, of)]
            work.run(_COPY_ITEMS, of | {"keys": copied})
            work.run(_COPY_FAN_OUTS, of | {"keys": copied})

        return submission.create(transaction, prepared, copy)

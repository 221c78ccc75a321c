"""
What can be done with runs: submit, claim, renew, record, cancel.

Each call is one transaction on the database that it is given; messages follow its commit.
A claim is a compare-and-set; everything else happens under the lock of the run and passes through `run.advance`,
which refuses what cannot happen. A record of an attempt that is no longer held is refused with LeaseLost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

from app.fleet.model import slug
from app.kernel import ids, log
from app.kernel.broker import IO_QUEUE, Publisher, model_queue
from app.kernel.database import Database, Work
from app.kernel.errors import (
    FailureReason,
    IdempotencyKeyReused,
    InvalidTransition,
    LeaseLost,
    NotFound,
)
from app.workflows import definition as definitions
from app.workflows import inputs, store
from app.workflows import run as runs
from app.workflows.change import Change, as_json, known
from app.workflows.definition import Definition, GenerateStep
from app.workflows.messages import Message, send_after_commit
from app.workflows.outcomes import Failure, Success, Usage
from app.workflows.run import (
    FINAL_RUNS,
    HELD_STEPS,
    CancelRequested,
    DelayOver,
    Run,
    RunState,
    StepState,
    StepSucceeded,
)

_log = log.get(__name__)


@dataclass(frozen=True, slots=True)
class Submission:
    """What a client asks for."""

    definition: Definition
    inputs: Mapping[str, Any]
    #: The version, for a named workflow.
    version: int | None = None
    priority: str | None = None
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """The run that answers a submission."""

    id: UUID
    #: False when the idempotency key had been used for the same submission before.
    created: bool


@dataclass(frozen=True, slots=True)
class Claim:
    """A step in the hands of a worker, with all that its work needs."""

    step_id: UUID
    run_id: UUID
    key: str
    attempt: int
    priority: str
    definition: Definition
    inputs: Mapping[str, Any]
    #: Outputs of the steps before it, by id.
    outputs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Runs:
    """The use cases. The fields are what they stand on."""

    database: Database
    publisher: Publisher
    lease: timedelta
    max_worker_losses: int
    #: Draws from [0, 1).
    chance: Callable[[], float] = field(default=ids.chance)

    def submit(self, submission: Submission) -> Accepted:
        """
        Write a run and send its first steps.

        The same idempotency key with the same content gives the run that it gave before.

        Raises InvalidInput when the inputs break their schemas, IdempotencyKeyReused when the key came with another
        content. Nothing is stored then.
        """
        definition = submission.definition
        given = inputs.resolve(definition, submission.inputs)
        sha256, document = _identity(definition)
        priority = submission.priority or definition.priority
        request = _hash([sha256, submission.version, given, priority])
        run_id = ids.new_id()
        advanced = runs.advance(_fresh(run_id, definition), runs.RunSubmitted())
        with self.database.work() as work:
            store.keep_definition(work, sha256, document)
            written = store.insert_run(
                work,
                {
                    "id": run_id,
                    "workflow": definition.workflow,
                    "version": submission.version,
                    "sha256": sha256,
                    "state": advanced.run.state,
                    "priority": priority,
                    "inputs": as_json(given),
                    "key": submission.idempotency_key,
                    "request": request if submission.idempotency_key else None,
                },
            )
            if not written:
                assert submission.idempotency_key is not None
                return _earlier(work, submission.idempotency_key, request)
            rows = [
                _step_values(run_id, position, step, definition, priority, advanced.run)
                for position, step in enumerate(definition.steps)
            ]
            store.insert_steps(work, rows)
            for row in rows:
                if row["state"] == StepState.READY:
                    name = f"{definition.workflow}/{row['key']}"
                    message = Message(row["id"], row["attempt"], row["queue"], priority, name)
                    send_after_commit(work, self.publisher, message)
        _log.info("run_submitted", run_id=str(run_id), workflow=definition.workflow, steps=len(rows))
        return Accepted(run_id, created=True)

    def claim(self, step_id: UUID, attempt: int, owner: str) -> Claim | None:
        """Take a step, or None: it was taken, ended or sent anew since the message about it was written."""
        with self.database.work() as work:
            row = store.claim(work, step_id, attempt, owner, self.lease)
            if row is None:
                return None
            claim = self._claim(work, row.id, row.key, row.attempt, row)
        if row.state == RunState.QUEUED:
            # In a transaction of its own: whoever locks a run and a step locks the run first.
            with self.database.work() as work:
                store.begin_run(work, row.run_id)
        return claim

    def renew(self, step_ids: Sequence[UUID], owner: str) -> dict[UUID, tuple[int, StepState]]:
        """Extend the owner's leases; gives attempt and state of those that it still has."""
        with self.database.work() as work:
            rows = store.renew(work, step_ids, owner, self.lease)
        return {row.id: (row.attempt, StepState(row.state)) for row in rows}

    def succeed(self, claim: Claim, owner: str, success: Success) -> Claim | None:
        """
        Record the output of a claimed step and send what follows.

        Where what follows is short and on the same queue, one step of it is claimed for the owner in the same
        transaction and given back, to be done at once.

        Raises LeaseLost when the attempt is no longer the owner's; the output is dropped then.
        """
        with self.database.work() as work:
            change = self._open(work, claim.run_id, claim, owner)
            change.apply(StepSucceeded(claim.key, claim.attempt))
            change.output(claim.key, success.output, success.usage)
            following = change.claim_short(claim.key, owner)
            store.end_attempt(work, _attempt_row(claim.step_id, claim.attempt, "succeeded", None, None, success.usage))
            change.write()
            if following is None:
                return None
            row = change.rows[following.key]
            store.begin_attempt(work, row.id, following.attempt, owner)
            return self._claim(work, row.id, following.key, following.attempt, change.run_row)

    def fail(self, claim: Claim, owner: str, failure: Failure) -> None:
        """
        Record that the attempt failed; the retry rule decides what follows.

        Raises LeaseLost when the attempt is no longer the owner's.
        """
        with self.database.work() as work:
            change = self._open(work, claim.run_id, claim, owner)
            change.fail(
                claim.key, claim.attempt, failure.reason, failure.message, self.chance(), self.max_worker_losses
            )
            change.output(claim.key, None, failure.usage, has_output=False)
            values = _attempt_row(
                claim.step_id, claim.attempt, failure.reason, failure.message, failure.text, failure.usage
            )
            store.end_attempt(work, values)
            change.write()

    def cancel(self, run_id: UUID) -> RunState:
        """
        Ask a run to end; gives its state after that. A run that has ended stays as it is.

        Raises NotFound.
        """
        with self.database.work() as work:
            change = self._open(work, run_id)
            if change.run.state in FINAL_RUNS:
                return change.run.state
            change.apply(CancelRequested())
            change.write()
        _log.info("run_cancel_requested", run_id=str(run_id))
        return change.run.state

    def lose(self, run_id: UUID, key: str, attempt: int) -> bool:
        """The lease of a held step may have run out: if it has, its holder is taken for dead."""
        with self.database.work() as work:
            change = self._open(work, run_id)
            row = change.rows[key]
            if row.attempt != attempt or not row.expired or row.state not in HELD_STEPS:
                return False
            message = f"worker {row.owner} did not renew its lease: it died, or was cut off"
            self._fail(change, key, attempt, FailureReason.WORKER_LOST, message)
            store.end_attempt(work, _attempt_row(row.id, attempt, FailureReason.WORKER_LOST, message, None, Usage()))
            change.write()
        _log.warning("step_lost", run_id=str(run_id), step=key, attempt=attempt, owner=row.owner)
        return True

    def resume(self, run_id: UUID, key: str, attempt: int) -> bool:
        """The delay of a waiting step is over: send it. False when somebody else did, or it was cancelled."""
        with self.database.work() as work:
            change = self._open(work, run_id)
            try:
                change.apply(DelayOver(key, attempt))
            except InvalidTransition:
                return False
            change.write()
        return True

    def _open(self, work: Work, run_id: UUID, claim: Claim | None = None, owner: str | None = None) -> Change:
        row = store.lock_run(work, run_id)
        if row is None:
            raise NotFound("run", str(run_id))
        steps = {step.key: step for step in store.steps_of(work, run_id)}
        change = Change(work, row, steps, self.lease, self.publisher)
        if claim is not None:
            held = change.rows[claim.key]
            if held.attempt != claim.attempt or held.owner != owner or held.state not in HELD_STEPS:
                raise LeaseLost(f"step {claim.key} of run {run_id}: attempt {claim.attempt} is not held by {owner}")
        return change

    def _fail(self, change: Change, key: str, attempt: int, reason: FailureReason, message: str) -> None:
        change.fail(key, attempt, reason, message, self.chance(), self.max_worker_losses)

    def _claim(self, work: Work, step_id: UUID, key: str, attempt: int, row: Any) -> Claim:
        of = known(work, row.sha256)
        needed = sorted(of.before[key]) if of.definition.step(key).kind != "noop" else []
        run_id: UUID = getattr(row, "run_id", row.id)
        outputs = store.outputs(work, run_id, needed) if needed else {}
        return Claim(step_id, run_id, key, attempt, row.priority, of.definition, row.inputs, outputs)


def queue_of(definition: Definition, step: definitions.Step) -> str:
    """The queue whose workers can do the step."""
    return model_queue(slug(definition.model_of(step))) if isinstance(step, GenerateStep) else IO_QUEUE


def _fresh(run_id: UUID, definition: Definition) -> Run:
    steps = {step.id: runs.begin(step.id, step.needs, step.retry) for step in definition.steps}
    return Run(str(run_id), RunState.QUEUED, steps)


def _step_values(
    run_id: UUID, position: int, step: definitions.Step, definition: Definition, priority: str, run: Run
) -> dict[str, Any]:
    begun = run.steps[step.id]
    return {
        "id": ids.new_id(),
        "run_id": run_id,
        "key": step.id,
        "position": position,
        "kind": step.kind,
        "model": definition.model_of(step) if isinstance(step, GenerateStep) else None,
        "queue": queue_of(definition, step),
        "priority": priority,
        "state": begun.state,
        "attempt": begun.attempt,
    }


def _earlier(work: Work, key: str, request: str) -> Accepted:
    row = store.run_of_key(work, key)
    assert row is not None, "the key is taken, and runs are not removed while they hold one"
    if row.request_sha256 != request:
        raise IdempotencyKeyReused(key, str(row.id))
    return Accepted(row.id, created=False)


def _attempt_row(
    step_id: UUID, attempt: int, outcome: str, message: str | None, text: str | None, usage: Usage
) -> dict[str, Any]:
    first = usage.first_token
    return {
        "id": step_id,
        "attempt": attempt,
        "outcome": outcome,
        "message": message,
        # Postgres keeps no NUL in a text.
        "text": None if text is None else text.replace("\x00", "\ufffd"),
        "tokens_in": usage.tokens_in,
        "tokens_out": usage.tokens_out,
        "tokens_cached": usage.tokens_cached,
        "first_token_ms": None if first is None else round(first.total_seconds() * 1000),
    }


def _identity(definition: Definition) -> tuple[str, str]:
    return definition.sha256(), as_json(definition.document())


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

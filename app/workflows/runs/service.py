"""
What can be done with runs by those who work on them: submit, claim, renew, record; and by the sweep.

Each call is one transaction on the database that it is given; messages follow its commit.
A claim is a compare-and-set; everything else happens under the lock of the run and passes through `run.advance`,
which refuses what cannot happen. A record of an attempt that is no longer held is refused with LeaseLost.
One transaction locks one run: what concerns another (a run that called this one) follows in a transaction of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

from app.access import namespaces
from app.kernel import ids, log
from app.kernel.broker import Publisher
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import (
    ArrieroError,
    FailureReason,
    InvalidTransition,
    LeaseLost,
    NotFound,
    PayloadTooLarge,
    StepFailure,
)
from app.workflows.language.steps import TIMED_OUT, MapStep, WaitStep
from app.workflows.runs import claims, messages, submission, transactions, waits
from app.workflows.runs.change import RunChange, queue_of, stop_items
from app.workflows.runs.claims import Claim
from app.workflows.runs.storage import items, payloads, store
from app.workflows.runs.storage.payloads import PayloadLimits
from app.workflows.runs.submission import Accepted, Submission
from app.workflows.runs.transactions import afterwards
from app.workflows.state_machine import events, fan_out
from app.workflows.state_machine.outcomes import (
    Awaited,
    Called,
    Expanded,
    Failure,
    Signalled,
    Success,
    Timed,
    TokenUsage,
)
from app.workflows.state_machine.states import FINAL_RUNS, HELD_STEPS, RunState, StepState

_log = log.get(__name__)

#: Why a called run is cancelled.
CALLER_STOPPED = "the step that called it was stopped"


@dataclass(frozen=True, slots=True)
class Runs:
    """The use cases. The fields are what they stand on."""

    database: Database
    publisher: Publisher
    lease: timedelta
    max_worker_losses: int
    #: How long finished runs are kept that do not say it themselves.
    retention: timedelta = timedelta(days=30)
    #: How long inputs and outputs may be.
    limits: PayloadLimits = field(default_factory=PayloadLimits)
    #: Draws from [0, 1).
    chance: Callable[[], float] = field(default=ids.chance)
    #: How long a transaction waits for rows that another has locked; None is as the database says.
    lock_wait: timedelta | None = None

    @contextmanager
    def transaction(self, within: UnitOfWork | None = None) -> Iterator[UnitOfWork]:
        """
        A transaction, or the one that goes on already.

        Raises RowsLocked when rows are locked for longer than `lock_wait`.
        """
        if within is not None:
            yield within
        else:
            with transactions.begin(self.database, self.lock_wait) as work:
                yield work

    def submit(self, asked: Submission) -> Accepted:
        """
        Write a run and send its first steps.

        The same idempotency key with the same content gives the run that it gave before, and so does the same
        deduplication key within its window.

        Raises InvalidInput when the inputs break their schemas, PayloadTooLarge, IdempotencyKeyReused when the key came
        with another content, ConcurrencyLimitReached when the run is one too many and its workflow refuses these.
        Nothing is stored then.
        """
        if asked.idempotency_key is not None:
            # First of all: what was accepted before is not refused now because its workflow has changed.
            with self.transaction() as work:
                earlier = submission.of_key(work, asked.idempotency_key, submission.fingerprint(asked))
            if earlier is not None:
                return earlier
        prepared = submission.prepare(asked, self.retention, self.limits)
        with self.transaction() as work:
            return self.write(work, prepared)

    def claim(self, step_id: UUID, attempt: int, owner: str) -> Claim | None:
        """Take a step, or None: it was taken, ended or sent anew since the message about it was written."""
        with self.transaction() as work:
            row = store.claim(work, step_id, attempt, owner, self.lease)
            if row is None:
                return None
            claim = claims.take(work, row, self.limits)
        if row.to_begin:
            with self.transaction() as work:
                store.begin_run(work, row.run_id)
        return claim

    def renew(self, step_ids: Sequence[UUID], owner: str) -> dict[UUID, tuple[int, StepState]]:
        """Extend the owner's leases; gives attempt and state of those that it still has."""
        with self.transaction() as work:
            rows = store.renew(work, step_ids, owner, self.lease)
        return {row.id: (row.attempt, StepState(row.state)) for row in rows}

    def succeed(self, claim: Claim, owner: str, success: Success) -> Claim | None:
        """
        Record the output of a claimed step and send what follows.

        Where what follows is short and on the same queue, one step of it is claimed for the owner in the same
        transaction and given back, to be done at once. An output that cannot be stored fails the attempt.

        Raises LeaseLost when the attempt is no longer the owner's; the output is dropped then.
        """
        try:
            text = payloads.encoded_output(success.output, self.limits)
        except StepFailure as failure:
            self.fail(claim, owner, Failure(failure.reason, failure.message, usage=success.usage))
            return None
        with self.transaction() as work:
            change = self._held(work, claim, owner)
            change.succeed(claim.key, claim.attempt, success.output, success.usage, text=text)
            claims.end_attempt(work, claim, "succeeded", success.usage)
            if claim.parent_id is not None:
                self._item_changed(work, change, claim.parent_id)
                return None
            following = change.claim_short(claim.key, owner)
            change.write()
            return None if following is None else claims.follow(work, change, following.key, owner)

    def leave(self, claim: Claim, owner: str, awaited: Awaited) -> None:
        """
        Record that the work of a claimed step goes on elsewhere: its items, a run that it calls, time, an event.

        Raises LeaseLost when the attempt is no longer the owner's; nothing is begun then.
        """
        with self.transaction() as work:
            change = self._held(work, claim, owner)
            claims.end_attempt(work, claim, "left", TokenUsage())
            match awaited:
                case Expanded(found):
                    self._expand(work, change, claim, found)
                case Called():
                    self._call(work, change, claim, awaited)
                case Timed():
                    waits.begin_timed(change, claim, awaited)
                case Signalled():
                    waits.begin_signalled(work, change, claim, awaited)
            if claim.parent_id is not None:
                self._item_changed(work, change, claim.parent_id)
            else:
                change.write()

    def fail(self, claim: Claim, owner: str, failure: Failure) -> None:
        """
        Record that the attempt failed; the retry rule decides what follows.

        Raises LeaseLost when the attempt is no longer the owner's.
        """
        with self.transaction() as work:
            change = self._held(work, claim, owner)
            self._fail(
                change,
                claim.key,
                claim.attempt,
                failure.reason,
                failure.message,
                usage=failure.usage,
                not_before=failure.retry_after,
                final=failure.final,
            )
            claims.end_attempt(work, claim, failure.reason, failure.usage, failure.message, failure.text)
            self.written(work, change)

    def expire_lease(self, run_id: UUID, key: str, attempt: int, within: UnitOfWork | None = None) -> bool:
        """The lease of a held step may have run out: if it has, its holder is taken for dead."""
        with self.transaction(within) as work:
            change = self.open(work, run_id, key)
            row = change.rows[key]
            if row.attempt != attempt or not row.expired or row.state not in HELD_STEPS:
                return False
            message = f"worker {row.owner} did not renew its lease: it died, or was cut off"
            self._fail(change, key, attempt, FailureReason.WORKER_LOST, message)
            claims.end(work, row.id, attempt, FailureReason.WORKER_LOST, TokenUsage(), message)
            self.written(work, change)
        _log.warning("step_lost", run_id=str(run_id), step=key, attempt=attempt, owner=row.owner)
        return True

    def end_delay(self, run_id: UUID, key: str, attempt: int, within: UnitOfWork | None = None) -> bool:
        """The delay of a step is over: send it, or end its waiting. False when somebody else did."""
        with self.transaction(within) as work:
            change = self.open(work, run_id, key)
            step, row = change.graph.steps.get(key), change.rows[key]
            try:
                if row.state == StepState.AWAITING and isinstance(step, WaitStep):
                    self._wait_over(change, step, attempt)
                else:
                    change.apply(events.DelayOver(key, attempt))
            except InvalidTransition:
                return False
            self.written(work, change)
        return True

    def time_out(self, run_id: UUID, key: str, within: UnitOfWork | None = None) -> bool:
        """The time for the whole of a step is over, and nobody holds it."""
        with self.transaction(within) as work:
            change = self.open(work, run_id, key)
            row = change.rows[key]
            if not row.late:
                return False
            message = "the time for the whole step (total_timeout) is over"
            change.note(key, {"reason": FailureReason.TIMEOUT, "message": message, "attempt": row.attempt})
            change.message = message
            try:
                change.apply(events.StepOutOfTime(key))
            except InvalidTransition:
                return False
            self.written(work, change)
        return True

    def run_ended(self, run_id: UUID, parent_step_id: UUID | None, concurrency_key: str | None) -> None:
        """What follows the end of a run: the step that called it is answered, the next of its key begins."""
        if parent_step_id is not None:
            afterwards(partial(self.answer, run_id), run_id)
        if concurrency_key is not None:
            afterwards(partial(self.admit, concurrency_key), run_id)

    def stop_called(self, step_id: UUID) -> None:
        """Cancel the open runs that a step has called."""
        afterwards(partial(self._stop_called, step_id), step_id)

    def _stop_called(self, step_id: UUID) -> None:
        with self.transaction() as work:
            called = store.called_by(work, step_id)
        for row in called:
            afterwards(partial(self.cancel, row.id, message=CALLER_STOPPED), row.id)

    def answer(self, run_id: UUID) -> bool:
        """A run that a step called has ended: the step succeeds with its output, or fails. False when it did before."""
        with self.transaction() as work:
            child = store.ended_call(work, run_id)
            if child is None:
                return False
            change = self.open(work, child.parent_run_id, child.key)
            row = change.rows[child.key]
            if row.state not in (StepState.AWAITING, StepState.CANCELLING) or not row.delegated:
                return False
            if (row.awaits or {}).get("run", str(run_id)) != str(run_id):
                return False
            usage = TokenUsage(child.tokens_in, child.tokens_out)
            if child.state == RunState.SUCCEEDED:
                change.succeed(row.key, row.attempt, child.output, usage)
            else:
                reason, detail = FailureReason.CHILD_FAILED, (child.error or {}).get("message") or "no step says why"
                if submission.TOO_DEEP in detail:  # no level tries that again: each would multiply the runs below it
                    reason, detail = FailureReason.INVALID_REQUEST, submission.TOO_DEEP
                message = f"run {run_id} of {child.workflow} ended {child.state}: {detail}"
                self._fail(change, row.key, row.attempt, reason, message, usage=usage)
            self.written(work, change)
        return True

    def admit(self, concurrency_key: str) -> int:
        """Let blocked runs of a key begin, as far as its limit allows; gives how many did."""
        admitted = 0
        while True:
            with self.transaction() as work:
                run_id = submission.next_admissible(work, concurrency_key)
                if run_id is None:
                    return admitted
                change = self.open(work, run_id)
                if change.run.state is not RunState.BLOCKED:
                    continue
                change.apply(events.RunAdmitted())
                change.write()
                admitted += 1

    def cancel(
        self,
        run_id: UUID,
        *,
        message: str = "cancelled on request",
        ending: RunState = RunState.CANCELLED,
        within: UnitOfWork | None = None,
    ) -> RunState:
        """
        Ask a run to end; gives its state after that. A run that has ended stays as it is.

        Raises NotFound.
        """
        with self.transaction(within) as work:
            change = self.open(work, run_id)
            if change.run.state in FINAL_RUNS or change.run.state is RunState.COMPENSATING:
                return change.run.state
            change.message = change.run_error = message
            change.apply(events.CancelRequested(ending))
            change.write()
        _log.info("run_cancel_requested", run_id=str(run_id), message=message)
        return change.run.state

    def open(self, work: UnitOfWork, run_id: UUID, key: str | None = None) -> RunChange:
        """
        A run under its lock; with the key of an item of a map, that item alone.

        Raises NotFound.
        """
        if key is not None and "[" in key:
            row, item = store.open_item(work, run_id, key)
            rows = [] if item is None else [item]
        else:
            row, rows = store.open_run(work, run_id)
        if row is None:
            raise NotFound("run", str(run_id))
        if key is not None and all(row.key != key for row in rows):
            raise NotFound("step", key, [row.key for row in rows])
        return self._change(work, row, rows)

    def _change(
        self, work: UnitOfWork, row: Any, rows: Sequence[Any], inputs: Mapping[str, Any] | None = None
    ) -> RunChange:
        return RunChange(
            work,
            claims.known(work, row.sha256),
            row,
            rows,
            lease=self.lease,
            publisher=self.publisher,
            aftermath=self,
            limits=self.limits,
            inputs=inputs,
        )

    def _held(self, work: UnitOfWork, claim: Claim, owner: str) -> RunChange:
        change = self.open(work, claim.run_id, claim.key)
        held = change.rows[claim.key]
        if held.attempt != claim.attempt or held.owner != owner or held.state not in HELD_STEPS:
            raise LeaseLost(f"step {claim.key} of run {claim.run_id}: attempt {claim.attempt} is not held by {owner}")
        return change

    def _fail(
        self, change: RunChange, key: str, attempt: int, reason: FailureReason, message: str, **more: Any
    ) -> None:
        change.fail(key, attempt, reason, message, chance=self.chance(), max_losses=self.max_worker_losses, **more)

    def written(self, work: UnitOfWork, change: RunChange) -> None:
        """Write a change; where it ends an item, carry that over to the map."""
        if change.is_item:
            (row,) = change.rows.values()
            self._item_changed(work, change, row.parent_id)
        else:
            change.write()

    def _item_changed(self, work: UnitOfWork, change: RunChange, parent_id: UUID) -> None:
        change.write()
        (step,) = change.run.steps.values()
        if change.run.state not in FINAL_RUNS:
            return
        definition = change.graph.steps[step.key.partition("[")[0]]
        assert isinstance(definition, MapStep)
        row = change.rows[step.key]
        before, begun = items.fan_of(row), row.state != StepState.PENDING
        missed = step.state is StepState.FAILED or (step.state is StepState.CANCELLED and not before.stopping)
        fan = fan_out.item_ended(before, failed=missed, collect=definition.on_error == "collect", begun=begun)
        if fan.stopping and not before.stopping:
            items.keep(work, parent_id, fan)
            fan = stop_items(work, parent_id, self) or fan
        self._refill(work, change, definition, parent_id, fan)

    def _refill(
        self, work: UnitOfWork, change: RunChange, definition: MapStep, parent_id: UUID, fan: fan_out.FanOut
    ) -> None:
        """Let the next items begin, or end the map."""
        fan, count = fan_out.refill(fan, definition.max_parallel)
        items.keep(work, parent_id, fan)
        if count:
            started = items.start(work, parent_id, count)
            if not change.run_row.paused:
                work.after_commit(partial(self._send, change.run_row.workflow, started))
        ended = fan_out.ended(fan, collect=definition.on_error == "collect")
        if ended is None:
            return
        whole = self.open(work, change.run_row.id) if change.is_item else change
        self._end_map(work, whole, definition, fan, ended)
        if change.is_item:
            whole.write()

    def _send(self, workflow: str, started: Any) -> None:
        for row in started.fetchall():
            messages.send(self.publisher, messages.of(row, workflow))

    def _end_map(
        self, work: UnitOfWork, change: RunChange, definition: MapStep, fan: fan_out.FanOut, ended: fan_out.MapEnding
    ) -> None:
        row, step = change.rows[definition.id], change.run.steps[definition.id]
        if step.state not in (StepState.AWAITING, StepState.CANCELLING):
            return
        used = items.used(work, row.id)
        usage = TokenUsage(int(used.tokens_in), int(used.tokens_out))
        story = items.story(work, row.id, fan)
        match ended:
            case fan_out.MapEnding.SUCCEEDED if used.output_bytes > self.limits.one:
                message = str(PayloadTooLarge("the outputs of its items together", used.output_bytes, self.limits.one))
                self._fail(change, row.key, step.attempt, FailureReason.INVALID_OUTPUT, message, usage=usage)
            case fan_out.MapEnding.SUCCEEDED:
                if story:
                    change.note(row.key, {"reason": FailureReason.CHILD_FAILED, "attempt": step.attempt} | story)
                change.succeed_delegated(row.key, step.attempt, usage)
            case fan_out.MapEnding.FAILED:
                message = story.pop("message")
                self._fail(change, row.key, step.attempt, FailureReason.CHILD_FAILED, message, usage=usage, story=story)
            case fan_out.MapEnding.STOPPED:
                self._fail(change, row.key, step.attempt, FailureReason.CANCELLED, "cancelled on request", usage=usage)

    def _expand(self, work: UnitOfWork, change: RunChange, claim: Claim, found: Sequence[Any]) -> None:
        definition = claim.work
        assert isinstance(definition, MapStep)
        models, row = change.graph.models(claim.key), change.rows[claim.key]
        work_of = {"kind": definition.step.kind, "model": models[0] if models else None, "queue": queue_of(models)}
        try:
            fan = items.expand(work, claim.run_id, row, work_of, found, self.limits)
        except ArrieroError as error:
            self._fail(change, claim.key, claim.attempt, FailureReason.INVALID_REQUEST, str(error))
            return
        items.keep(work, claim.step_id, fan)
        change.leave(claim.key, claim.attempt, {"items": len(found)}, delegated=True)
        self._refill(work, change, definition, claim.step_id, items.find(work, claim.step_id) or fan)

    def _call(self, work: UnitOfWork, change: RunChange, claim: Claim, called: Called) -> None:
        row = change.run_row
        if row.depth + 1 > submission.MAX_DEPTH:
            self._fail(change, claim.key, claim.attempt, FailureReason.INVALID_REQUEST, submission.TOO_DEEP)
            return
        labels = namespaces.inherited(row.labels)
        asked = Submission(called.definition, called.inputs, called.version, row.priority, rank=row.rank, labels=labels)
        try:
            prepared = submission.prepare(
                asked, self.retention, self.limits, parent_step_id=claim.step_id, depth=row.depth + 1
            )
            accepted = self.write(work, prepared)
        except ArrieroError as error:
            reason = FailureReason.REJECTED if isinstance(error, submission.TOO_MANY) else FailureReason.INVALID_REQUEST
            self._fail(change, claim.key, claim.attempt, reason, f"{called.definition.workflow} cannot be run: {error}")
            return
        awaits = {"run": str(accepted.id), "workflow": called.definition.workflow}
        change.leave(claim.key, claim.attempt, awaits, delegated=True)

    def write(
        self, work: UnitOfWork, prepared: submission.Prepared, fill: Callable[[], None] | None = None
    ) -> Accepted:
        """Write a run, and begin it unless it has to wait for others. `fill` puts in what it has of another run."""
        earlier, to_cancel = submission.write(work, prepared)
        if earlier is not None:
            return earlier
        if fill is not None:
            fill()
        row, steps = store.open_run(work, prepared.id)
        assert row is not None, "it was written in this transaction"
        source = prepared.run["forked_from"]
        store.add_event(work, row.id, "submitted", {"forked_from": str(source)} if source else None)
        change = self._change(work, row, steps, prepared.inputs)
        change.apply(events.RunSubmitted())
        change.write()
        for run_id in to_cancel:
            cancel = partial(self.cancel, run_id, message="a newer run of its concurrency key came")
            work.after_commit(partial(afterwards, cancel, run_id))
        if row.state == RunState.BLOCKED:
            work.after_commit(partial(afterwards, partial(self.admit, row.concurrency_key), row.id))
        _log.info("run_submitted", run_id=str(row.id), workflow=row.workflow, steps=len(change.rows))
        return Accepted(prepared.id, created=True)

    def _wait_over(self, change: RunChange, step: WaitStep, attempt: int) -> None:
        if step.signal is None:
            change.succeed(step.id, attempt, None, TokenUsage())
        elif step.on_timeout == "continue":
            change.succeed(step.id, attempt, None, TokenUsage(), TIMED_OUT)
        else:
            message = f"no event {step.signal!r} came in time"
            self._fail(change, step.id, attempt, FailureReason.TIMEOUT, message)

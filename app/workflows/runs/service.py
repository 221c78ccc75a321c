"""
The service of runs: submit, claim, renew, record, cancel.

A transaction locks one run. The effects of a call are carried out after its commit, each in a transaction of its own.
A claim is a compare-and-set. Everything else happens under the lock of the run and passes through the transition table,
which refuses what cannot happen. A record of an attempt that is no longer held is refused with LeaseLost.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from uuid import UUID

from app.kernel import log, tracing
from app.kernel.broker import Publisher
from app.kernel.database import Database
from app.kernel.errors import Conflict, LeaseLost, NotFound, Unavailable
from app.workflows.language.definition import RouteModels
from app.workflows.runs import admission, agents, calls, claims, maps, messages, submission, waits
from app.workflows.runs.changes import cancellation
from app.workflows.runs.changes.change import RunChange, open_change
from app.workflows.runs.changes.effects import (
    AdmitRuns,
    AnswerCaller,
    CancelCalledRuns,
    CancelRun,
    Effect,
    PublishItems,
)
from app.workflows.runs.changes.transactions import RunPolicy, RunTransaction, begin
from app.workflows.runs.claims import Claim
from app.workflows.runs.messages import StepMessage
from app.workflows.runs.storage import payloads, store
from app.workflows.runs.submission import Accepted, Prepared, Submission
from app.workflows.state_machine import events
from app.workflows.state_machine.outcomes import (
    Awaited,
    Called,
    Continued,
    Expanded,
    Failure,
    Signalled,
    Success,
    Timed,
    TokenUsage,
)
from app.workflows.state_machine.states import HELD_STEPS, RunState, StepState

_log = log.get(__name__)


@dataclass(frozen=True, slots=True)
class Runs:
    """The service, with its dependencies."""

    database: Database
    publisher: Publisher
    policy: RunPolicy
    #: How long a transaction waits for rows that another has locked; None means the limit of the database.
    lock_wait: timedelta | None = None
    #: Chooses the models of new runs; None leaves them as the workflow names them.
    route: RouteModels | None = None
    #: Predicts how long a new run takes, and refuses one that cannot meet its deadline (InvalidInput).
    expect: Callable[[Prepared], dict[str, Any] | None] | None = None
    #: Assigns submissions to variants; None: nothing is divided.
    assign: Callable[[Submission], Submission] | None = None

    @contextmanager
    def transaction(self) -> Iterator[RunTransaction]:
        """
        One transaction. Its effects are carried out after the commit.

        Raises RowsLocked when rows are locked for longer than `lock_wait`.
        """
        with begin(self.database, self.lock_wait) as work:
            transaction = RunTransaction(work, self.policy)
            yield transaction
        for effect in transaction.effects:
            self._carry_out(effect)

    def submit(self, request: Submission) -> Accepted:
        """
        Write a run and send the messages of its first steps.

        The same idempotency key with the same content returns the earlier run, and so does the same deduplication key
        within its window.

        Raises InvalidInput when the inputs break their schemas or the deadline cannot be met, PayloadTooLarge,
        IdempotencyKeyReused when the key came with another content, ConcurrencyLimitReached when the workflow refuses
        runs above its limit. Nothing is stored then.
        """
        if request.idempotency_key is not None:
            # Before the checks: a request that was accepted is not refused later because its workflow has changed.
            with self.transaction() as transaction:
                fingerprint = submission.fingerprint(request)
                earlier = submission.of_key(
                    transaction.work, submission.namespace_of(request), request.idempotency_key, fingerprint
                )
            if earlier is not None:
                return earlier
        with tracing.span(
            f"submit {request.definition.workflow}", kind="producer", parent=request.trace_parent
        ) as span:
            assigned = request if self.assign is None else self.assign(request)
            prepared = submission.prepare(
                replace(assigned, trace_parent=None), self.policy, route=self.route, sent=request
            )
            if self.expect is not None:
                expected = self.expect(prepared)
                content = None if expected is None else json.dumps(expected)
                prepared = replace(prepared, run={**prepared.run, "expected": content})
            with self.transaction() as transaction:
                accepted = submission.create(transaction, prepared)
            span.set({"arriero.run.id": str(accepted.id)})
            return accepted

    def submit_held(self, request: Submission, owner: str, begun: timedelta = timedelta(0)) -> Claim | None:
        """
        Write a run whose one step the owner has begun already, and return the claim of that step; no message is sent.

        `begun` is how long ago that was: the attempt began then.

        Returns None when the step cannot be claimed: the run waits, or its workflow is paused. It is then a run like
        any other, and its message is sent. Raises what `submit` raises, and Conflict when the run exists already.
        """
        prepared = submission.prepare(request, self.policy)
        assert len(prepared.steps) == 1, "one step is claimed"
        step_id = prepared.steps[0]["id"]
        with self.transaction() as transaction:
            if not submission.create(transaction, prepared).created:
                raise Conflict(f"the run {prepared.id} exists already")
            claimed = store.claim(transaction.work, step_id, 1, owner, self.policy.lease)
            if claimed is None:
                return None
            transaction.effects.clear()
            store.backdate_attempt(transaction.work, step_id, 1, begun)
            return claims.take(transaction.work, claimed, self.policy.limits)

    def claim(self, step_id: UUID, attempt: int, owner: str) -> Claim | None:
        """Claim a step, or return None: that attempt is not ready, or the run is paused."""
        with self.transaction() as transaction:
            claimed = store.claim(transaction.work, step_id, attempt, owner, self.policy.lease)
            if claimed is None:
                return None
            claim = claims.take(transaction.work, claimed, self.policy.limits)
        if claimed.to_begin:
            with self.transaction() as transaction:
                store.begin_run(transaction.work, claimed.run_id)
        return claim

    def renew(self, step_ids: Sequence[UUID], owner: str) -> dict[UUID, tuple[int, StepState]]:
        """Extend the owner's leases; returns attempt and state of the steps that it still holds."""
        with self.transaction() as transaction:
            rows = store.renew(transaction.work, step_ids, owner, self.policy.lease)
        return {row.id: (row.attempt, StepState(row.state)) for row in rows}

    def succeed(self, claim: Claim, owner: str, success: Success) -> Claim | None:
        """
        Record the output of a claimed step and send the messages of the next steps.

        Where a next step is short and on the same queue, it is claimed for the owner in the same transaction and
        returned, to be done at once.

        Raises LeaseLost when the attempt is no longer the owner's; the output is dropped then. Raises StepFailure for
        an output that cannot be stored; the caller records it.
        """
        text = payloads.encoded_output(success.output, self.policy.limits)
        with self.transaction() as transaction:
            change = _open_held(transaction, claim, owner)
            change.succeed(claim.key, claim.attempt, success.output, success.usage, text=text)
            claims.end_attempt(transaction.work, claim, "succeeded", success.usage)
            if success.within is not None:
                success.within(transaction.work)
            following = None if change.item is not None else change.claim_short(claim.key, owner)
            maps.write_change(change)
            return None if following is None else claims.follow(change, following.key, owner)

    def leave(self, claim: Claim, owner: str, awaited: Awaited) -> StepState:
        """
        Record that a claimed step waits for time or an event, or is delegated to items or to a run that it calls.

        Returns its state: it has failed when its items or the run cannot be made.

        Raises LeaseLost when the attempt is no longer the owner's; nothing is begun then.
        """
        with self.transaction() as transaction:
            change = _open_held(transaction, claim, owner)
            claims.end_attempt(transaction.work, claim, "left", TokenUsage())
            match awaited:
                case Expanded(values):
                    maps.expand(change, claim, values)
                case Continued():
                    agents.proceed(change, claim, awaited)
                case Called():
                    calls.call(change, claim, awaited)
                case Timed():
                    waits.begin_timed(change, claim, awaited)
                case Signalled():
                    waits.begin_signalled(change, claim, awaited)
            maps.write_change(change)
            return change.run.steps[claim.key].state

    def fail(self, claim: Claim, owner: str, failure: Failure) -> StepState:
        """
        Record that the attempt failed; the retry rule decides what follows. Returns the state of the step then.

        Raises LeaseLost when the attempt is no longer the owner's.
        """
        with self.transaction() as transaction:
            change = _open_held(transaction, claim, owner)
            change.fail(
                claim.key,
                claim.attempt,
                failure.reason,
                failure.message,
                usage=failure.usage,
                not_before=failure.retry_after,
                final=failure.final,
            )
            work = transaction.work
            claims.end_attempt(work, claim, failure.reason, failure.usage, failure.message, failure.text)
            maps.write_change(change)
            return change.run.steps[claim.key].state

    def cancel(
        self, run_id: UUID, *, message: str = "cancelled on request", ending: RunState = RunState.CANCELLED
    ) -> RunState:
        """Request the end of a run; returns its state then. A run that has ended stays as it is. Raises NotFound."""
        with self.transaction() as transaction:
            return cancellation.cancel_run(transaction, run_id, message, ending)

    def answer(self, run_id: UUID) -> bool:
        """Give the result of a called run that has ended to its caller. False when the caller does not wait for it."""
        with self.transaction() as transaction:
            return calls.answer(transaction, run_id)

    def admit(self, concurrency_key: str) -> int:
        """Begin blocked runs of a key, as far as its limit allows; returns how many."""
        admitted = 0
        while True:
            with self.transaction() as transaction:
                run_id = admission.next_admissible(transaction.work, concurrency_key)
                if run_id is None:
                    return admitted
                change = open_change(transaction, run_id)
                if change.run.state is not RunState.BLOCKED:
                    continue
                change.apply(events.RunAdmitted())
                change.write()
                admitted += 1

    def _cancel_called(self, step_id: UUID) -> None:
        with self.transaction() as transaction:
            called = cancellation.called_runs(transaction.work, step_id)
        for run_id in called:
            self._carry_out(CancelRun(run_id, cancellation.CALLER_STOPPED))

    def _carry_out(self, effect: Effect) -> None:
        """
        Carry out an effect of a commit. If that raises, the commit stands and the other effects follow.

        The sweep repeats what was lost, and abandons a run that raises again.
        """
        try:
            match effect:
                case StepMessage():
                    messages.send(self.publisher, effect)
                case PublishItems(workflow, items):
                    for item in items.fetchall():
                        messages.send(self.publisher, StepMessage.of(item, workflow))
                case AnswerCaller(run_id):
                    self.answer(run_id)
                case AdmitRuns(key):
                    self.admit(key)
                case CancelRun(run_id, message):
                    self.cancel(run_id, message=message)
                case CancelCalledRuns(step_id):
                    self._cancel_called(step_id)
        except (Unavailable, NotFound) as error:
            _log.warning("effect_postponed", effect=str(effect), error=str(error))
        except Exception:  # noqa: BLE001 one effect must not stop the others
            _log.exception("effect_failed", effect=str(effect))


def _open_held(transaction: RunTransaction, claim: Claim, owner: str) -> RunChange:
    change = open_change(transaction, claim.run_id, claim.key)
    held = change.steps[claim.key]
    if held.attempt != claim.attempt or held.owner != owner or held.state not in HELD_STEPS:
        raise LeaseLost(f"step {claim.key} of run {claim.run_id}: attempt {claim.attempt} is not held by {owner}")
    return change

"""
Leases: the steps that this process holds, and the threads that renew their leases or give them up.

A lease is renewed while the engine makes progress, not merely while the process lives.
A cancel reaches its holder immediately by a notification of Postgres, or at the next renewal if the notification was
lost. There is a connection for notifications only while this process holds steps.
A lease that could not be renewed in time is given up here before it expires in the database. A thread of its own does
this, because the renewing thread may be waiting for a database that does not answer.
Errors of the renewal are logged, and the thread continues: without renewals, every longer step would be executed twice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from enum import StrEnum
from uuid import UUID

import psycopg

from app.kernel import log
from app.kernel.errors import DatabaseUnreachable
from app.workflows.runs.claims import Claim
from app.workflows.runs.service import Runs
from app.workflows.runs.storage.store import STOP_CHANNEL
from app.workflows.state_machine.states import StepState

_log = log.get(__name__)

#: The part of a lease without a renewal after which its holder gives it up.
_GIVE_UP = 0.8

#: The part of a lease between two checks of that.
_CHECK = 0.05

#: Most seconds of one wait for notifications; between two waits the listener checks whether it must end.
_LISTEN = 0.5

#: Seconds without a step after which the connection for notifications is closed.
_LINGER = 5.0


class StopReason(StrEnum):
    """Why a step must stop."""

    #: The step was cancelled.
    CANCELLED = "cancelled"
    #: The lease is lost or will expire: another worker has the step, or may have it soon.
    LOST = "lost"
    #: This process stops; the step is requeued.
    DRAINED = "drained"
    #: A more urgent step needs its thread; the step is requeued.
    PREEMPTED = "preempted"


class Holding:
    """A claimed step in this process: its last renewal, and its stop."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        #: When it was last renewed, by the monotonic clock.
        self.renewed = time.monotonic()
        self._lock = threading.Lock()
        self._reason: StopReason | None = None
        self._on_stop: Callable[[], None] | None = None

    @property
    def reason(self) -> StopReason | None:
        """The reason why the step must stop; None while it may continue."""
        return self._reason

    def on_stop(self, action: Callable[[], None]) -> None:
        """Set the function that stops the step; any thread may call it. After `stop` it is called immediately."""
        with self._lock:
            self._on_stop = action
            stopped = self._reason is not None
        if stopped:
            self._run(action)

    def stop(self, reason: StopReason) -> None:
        """Stop the step. The first reason is kept, but LOST replaces every other."""
        with self._lock:
            first = self._reason is None
            if first or reason is StopReason.LOST:
                self._reason = reason
            action = self._on_stop
        if first:
            _log.info("step_stop_requested", reason=reason, step_id=str(self.claim.step_id), attempt=self.claim.attempt)
            if action is not None:
                self._run(action)

    def _run(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:  # noqa: BLE001 an error of one action must not prevent the stop of other steps
            _log.exception("step_not_stopped", step_id=str(self.claim.step_id), attempt=self.claim.attempt)


class Leases:
    """The steps that this process holds, and the threads that renew their leases."""

    def __init__(
        self,
        runs: Runs,
        owner: str,
        *,
        interval: timedelta,
        stalled_for: Callable[[], timedelta] = lambda: timedelta(0),
    ) -> None:
        self._runs, self.owner = runs, owner
        self._interval = interval.total_seconds()
        self._lease = runs.policy.lease.total_seconds()
        self._stalled_for = stalled_for
        self._held: dict[UUID, Holding] = {}
        #: Steps that were held since the start.
        self.count = 0
        self._lock = threading.Lock()
        self._draining = False
        self._closed = threading.Event()
        #: Set while the threads have work: steps are held, or were until a moment ago, or `close` was called.
        self._active = threading.Event()
        self._thread = threading.Thread(target=self._renew_all, name="leases", daemon=True)
        self._guard = threading.Thread(target=self._give_up_late, name="leases-guard", daemon=True)

    def start(self) -> None:
        """Start the threads."""
        self._thread.start()
        self._guard.start()

    def close(self) -> None:
        """Stop the threads."""
        with self._lock:
            self._closed.set()
            self._active.set()
        self._thread.join(timeout=10)
        self._guard.join(timeout=10)

    @contextmanager
    def hold(self, claim: Claim) -> Iterator[Holding]:
        """Renew the lease of a claim until the block ends. An earlier attempt of its step here is stopped."""
        holding = Holding(claim)
        with self._lock:
            earlier = self._held.get(claim.step_id)
            self._held[claim.step_id] = holding
            self.count += 1
            self._active.set()
            draining = self._draining
        if earlier is not None:
            earlier.stop(StopReason.LOST)
        if draining:
            holding.stop(StopReason.DRAINED)
        try:
            yield holding
        finally:
            with self._lock:
                if self._held.get(claim.step_id) is holding:
                    del self._held[claim.step_id]

    def held(self) -> list[str]:
        """The priorities of the held steps."""
        return [holding.claim.priority for holding in self._all()]

    def preempt(self, priority: str, count: int) -> int:
        """
        Stop up to `count` steps of a class, those that were begun last; they are requeued.

        Steps that are stopping already count. Returns how many were stopped now.
        """
        held = [holding for holding in self._all() if holding.claim.priority == priority]
        running = [holding for holding in held if holding.reason is None]
        chosen = running[::-1][: max(count - (len(held) - len(running)), 0)]
        for holding in chosen:
            holding.stop(StopReason.PREEMPTED)
        return len(chosen)

    def wait_for_steps(self) -> None:
        """Wait until a step is held, or was until a moment ago, or `close` was called."""
        self._active.wait()

    def drain(self) -> None:
        """Stop all steps, now and in the future, at their next token; they are requeued."""
        with self._lock:
            self._draining = True
        for holding in self._all():
            holding.stop(StopReason.DRAINED)

    def _all(self) -> list[Holding]:
        with self._lock:
            return list(self._held.values())

    def _renew_all(self) -> None:
        while self._active.wait() and not self._closed.is_set():
            try:
                self._listen()
                continue
            except psycopg.OperationalError as error:
                _log.warning("leases_cannot_listen", error=str(error).strip())
            except Exception:  # noqa: BLE001 the outermost loop of the thread
                _log.exception("leases_interrupted")
            if not self._closed.is_set():
                self._renew_without_listening()

    def _listen(self) -> None:
        """Renew leases and receive notifications of cancels, until no steps are held, `close` or an error."""
        with psycopg.connect(self._runs.database.conninfo(), autocommit=True, connect_timeout=5) as connection:
            connection.execute(f"LISTEN {STOP_CHANNEL}")
            self._renew()
            last = time.monotonic()
            while not self._closed.is_set():
                if self._held:
                    last = time.monotonic()
                elif time.monotonic() - last > _LINGER and self._rest():
                    return
                for note in connection.notifies(timeout=min(self._interval, _LISTEN), stop_after=1):
                    self._on_notification(note.payload)
                self._renew_if_due()

    def _rest(self) -> bool:
        """Let the threads wait until the next step is held. Returns False when one is held now."""
        with self._lock:
            if not self._held and not self._closed.is_set():
                self._active.clear()
        return not self._active.is_set()

    def _renew_without_listening(self) -> None:
        """Renew once, and wait at most a second."""
        try:
            self._renew()
        except Exception:  # noqa: BLE001 as above: the next renewal follows
            _log.exception("leases_interrupted")
        self._closed.wait(min(1.0, self._interval))

    def _on_notification(self, payload: str) -> None:
        """Stop the step that a notification names. Its text is untrusted: every client of the database can send one."""
        try:
            step_id = UUID(payload)
        except ValueError:
            _log.warning("stop_notification_invalid", payload=payload[:100])
            return
        with self._lock:
            holding = self._held.get(step_id)
        if holding is not None:
            holding.stop(StopReason.CANCELLED)

    def _renew_if_due(self) -> None:
        oldest = min((holding.renewed for holding in self._all()), default=None)
        if oldest is not None and time.monotonic() - oldest >= self._interval * 0.9:
            self._renew()

    def _give_up_late(self) -> None:
        while self._active.wait() and not self._closed.wait(min(self._interval, self._lease * _CHECK)):
            try:
                for holding in self._all():
                    if time.monotonic() - holding.renewed > self._lease * _GIVE_UP:
                        holding.stop(StopReason.LOST)
            except Exception:  # noqa: BLE001 the outermost loop of the thread
                _log.exception("leases_not_checked")

    def _renew(self) -> None:
        """Renew the leases, if the engine makes progress."""
        held = self._all()
        if not held:
            return
        stalled = self._stalled_for()
        if stalled.total_seconds() >= self._lease:
            _log.error("engine_stalled", seconds=round(stalled.total_seconds(), 1), steps=len(held))
            return
        begun = time.monotonic()
        try:
            kept = self._runs.renew([holding.claim.step_id for holding in held], self.owner)
        except DatabaseUnreachable as error:
            _log.warning("leases_not_renewed", error=str(error))
            return
        for holding in held:
            self._apply_renewal(holding, kept.get(holding.claim.step_id), begun)

    def _apply_renewal(self, holding: Holding, found: tuple[int, StepState] | None, begun: float) -> None:
        if found is None or found[0] != holding.claim.attempt:
            # It may have been recorded between the listing and the renewal: then the stop has no effect.
            holding.stop(StopReason.LOST)
            return
        holding.renewed = begun
        if found[1] is StepState.CANCELLING:
            holding.stop(StopReason.CANCELLED)

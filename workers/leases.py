"""
Leases: what this process holds, and the threads that renew it or give it up.

A lease is renewed while the engine makes progress, not merely while the process lives.
A holder hears of a cancel at once by a notification of Postgres, and at the next renewal if that was lost.
A lease that could not be renewed in time is given up here before it ends there. A thread of its own sees to that:
whoever renews may be waiting for a database that does not answer.
Whatever goes wrong while renewing is logged, and the thread goes on: without it, every longer step would be done twice.
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

#: Part of a lease that may pass without a renewal before its holder gives up.
_GIVE_UP = 0.8

#: The part of the lease after which that is looked at again.
_LOOK = 0.05

#: Seconds after which the listener looks whether it is to end.
_LISTEN = 0.5


class StopReason(StrEnum):
    """Why a holder is to leave its work."""

    #: Somebody cancelled it.
    CANCELLED = "cancelled"
    #: Somebody else has it, or may have it soon.
    LOST = "lost"
    #: This process stops; the step goes back.
    DRAINED = "drained"


class Holding:
    """One claimed step in this process."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.renewed = time.monotonic()
        self._lock = threading.Lock()
        self._reason: StopReason | None = None
        self._on_stop: Callable[[], None] | None = None

    @property
    def reason(self) -> StopReason | None:
        """Why the work is to be left; None while it may go on."""
        return self._reason

    def on_stop(self, action: Callable[[], None]) -> None:
        """What makes the work stop, from any thread. Called at once when it was to stop already."""
        with self._lock:
            self._on_stop = action
            stopped = self._reason is not None
        if stopped:
            self._run(action)

    def stop(self, reason: StopReason) -> None:
        """Leave the work. The first reason counts, but that a lease is lost outweighs the others."""
        with self._lock:
            first = self._reason is None
            if first or reason is StopReason.LOST:
                self._reason = reason
            action = self._on_stop
        if first:
            _log.info("step_told_to_stop", reason=reason, step_id=str(self.claim.step_id), attempt=self.claim.attempt)
            if action is not None:
                self._run(action)

    def _run(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:  # noqa: BLE001 the engine's code: a failure of it keeps no other step from being stopped
            _log.exception("step_not_stopped", step_id=str(self.claim.step_id), attempt=self.claim.attempt)


class Leases:
    """Everything that this process holds."""

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
        self._lock = threading.Lock()
        self._draining = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="leases", daemon=True)
        self._guard = threading.Thread(target=self._mind, name="leases-guard", daemon=True)

    def start(self) -> None:
        """Begin to renew."""
        self._thread.start()
        self._guard.start()

    def close(self) -> None:
        """Renew no longer."""
        self._closed.set()
        self._thread.join(timeout=10)
        self._guard.join(timeout=10)

    @contextmanager
    def hold(self, claim: Claim) -> Iterator[Holding]:
        """Renew the claim until the block ends. An earlier attempt of its step in this process is lost by that."""
        holding = Holding(claim)
        with self._lock:
            earlier = self._held.get(claim.step_id)
            self._held[claim.step_id] = holding
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
        """The classes of the steps that are held now."""
        return [holding.claim.priority for holding in self._all()]

    def drain(self) -> None:
        """Every step, held now or later, goes back at its next token."""
        with self._lock:
            self._draining = True
        for holding in self._all():
            holding.stop(StopReason.DRAINED)

    def _all(self) -> list[Holding]:
        with self._lock:
            return list(self._held.values())

    def _watch(self) -> None:
        while not self._closed.is_set():
            try:
                self._listen()
            except psycopg.OperationalError as error:
                _log.warning("leases_cannot_listen", error=str(error).strip())
            except Exception:  # noqa: BLE001 the outermost loop of the thread
                _log.exception("leases_interrupted")
            if not self._closed.is_set():
                self._renew_without_listening()

    def _listen(self) -> None:
        """Renew, and hear of cancels, until the end or until something goes wrong."""
        with psycopg.connect(self._runs.database.raw_url(), autocommit=True, connect_timeout=5) as connection:
            connection.execute(f"LISTEN {STOP_CHANNEL}")
            self._renew()
            while not self._closed.is_set():
                for note in connection.notifies(timeout=min(self._interval, _LISTEN), stop_after=1):
                    self._heard(note.payload)
                self._renew_if_due()

    def _renew_without_listening(self) -> None:
        """Renew once, and wait a moment."""
        try:
            self._renew()
        except Exception:  # noqa: BLE001 as above: the next renewal follows
            _log.exception("leases_interrupted")
        self._closed.wait(min(1.0, self._interval))

    def _heard(self, payload: str) -> None:
        """Stop the step that a notification names. Anybody who reaches the database can send one."""
        try:
            step_id = UUID(payload)
        except ValueError:
            _log.warning("stop_names_no_step", payload=payload[:100])
            return
        with self._lock:
            holding = self._held.get(step_id)
        if holding is not None:
            holding.stop(StopReason.CANCELLED)

    def _renew_if_due(self) -> None:
        oldest = min((holding.renewed for holding in self._all()), default=None)
        if oldest is not None and time.monotonic() - oldest >= self._interval * 0.9:
            self._renew()

    def _mind(self) -> None:
        while not self._closed.wait(min(self._interval, self._lease * _LOOK)):
            try:
                for holding in self._all():
                    if time.monotonic() - holding.renewed > self._lease * _GIVE_UP:
                        holding.stop(StopReason.LOST)
            except Exception:  # noqa: BLE001 the outermost loop of the thread
                _log.exception("leases_not_given_up")

    def _renew(self) -> None:
        """Renew what is held, while the engine makes progress."""
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
            self._see(holding, kept.get(holding.claim.step_id), begun)

    def _see(self, holding: Holding, found: tuple[int, StepState] | None, begun: float) -> None:
        if found is None or found[0] != holding.claim.attempt:
            # It may have been recorded between the listing and the renewal: then nobody waits for this.
            holding.stop(StopReason.LOST)
            return
        holding.renewed = begun
        if found[1] is StepState.CANCELLING:
            holding.stop(StopReason.CANCELLED)

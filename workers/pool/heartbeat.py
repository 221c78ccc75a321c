"""
The heart of a pool: renews its claim on memory, tells what it does, and hears what is desired.

It beats from before the load until after the last step. A claim that was lost, or could not be renewed in time, is let
go of before it ends: the pool hands its steps back and ends; if it cannot, it ends at once. A thread of its own sees to
that: whoever renews may be waiting for a database that does not answer. Neither thread ends before the pool does: what
goes wrong in them is logged.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from queue import Empty, SimpleQueue

from app.fleet.holder import Grant, HeartbeatReply, HeartbeatReport, ReservationHolder
from app.fleet.pool import Desired
from app.kernel import log
from app.kernel.errors import DatabaseUnreachable, LeaseLost
from app.kernel.priority import Priority
from workers.leases import Leases
from workers.pool.progress import Status

_log = log.get(__name__)

#: Parts of the lease that may pass without a renewal before the pool begins to leave, and before it is gone.
_LEAVE, _GONE = 0.7, 0.9
#: The part of the lease after which that is looked at again.
_LOOK = 0.05
#: Exit code of a pool that let go of its bytes because it could not show that it may have them.
LET_GO = 7


class Heartbeat:
    """The heart of one pool."""

    def __init__(
        self, holder: ReservationHolder, grant: Grant, worker: str, status: Status, interval: timedelta, renewed: float
    ) -> None:
        """Beats once `start` is called. `renewed` is when the grant was taken, by the monotonic clock, or before."""
        self.grant, self.worker = grant, worker
        self._holder, self._interval = holder, interval.total_seconds()
        self._lease = holder.lease.total_seconds()
        self._status = status
        self._leases: Leases | None = None
        self._stalled_for: Callable[[], timedelta] = lambda: timedelta(0)
        self._renewed = renewed
        self._leaving = threading.Lock()
        self._closed = threading.Event()
        #: Wakes the heart. A queue of this kind may be filled by a signal's handler at any moment.
        self._now: SimpleQueue[None] = SimpleQueue()
        self._threads = grant.threads
        self._on_threads: Callable[[int], None] = lambda _: None
        self._on_beat: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._beat, name="heart", daemon=True)
        self._guard = threading.Thread(target=self._mind_the_lease, name="lease-guard", daemon=True)

    def start(self) -> None:
        """Begin to beat; from now on each change of the phase is reported at once."""
        self._status.on_change = lambda: self._now.put(None)
        self._thread.start()
        self._guard.start()

    def serve(self, leases: Leases, stalled_for: Callable[[], timedelta]) -> None:
        """From now on there is work: its leases, and the engine's progress."""
        self._leases, self._stalled_for = leases, stalled_for

    def on_threads(self, action: Callable[[int], None]) -> None:
        """Who hears that the pool's part of the cores is another."""
        self._on_threads = action

    def on_beat(self, action: Callable[[], None]) -> None:
        """What is done after each beat that was heard. It may find the database away, or the claim lost."""
        self._on_beat = action

    def stop(self) -> None:
        """Tell the last, and beat no more."""
        self._closed.set()
        self._now.put(None)
        self._thread.join(timeout=10)

    def _beat(self) -> None:
        while True:
            closing = self._closed.is_set()
            try:
                self._renew()
            except Exception:  # noqa: BLE001 the outermost loop of the thread; the guard sees what is not renewed
                _log.exception("heartbeat_failed")
            if closing:
                return
            with contextlib.suppress(Empty):
                self._now.get(timeout=self._interval)

    def _renew(self) -> None:
        """One beat."""
        begun = time.monotonic()
        try:
            heard = self._holder.renew(self.grant.id, self.grant.epoch, self._report())
        except LeaseLost as error:
            self._leave(str(error))
        except DatabaseUnreachable as error:
            _log.warning("claim_not_renewed", error=str(error))
        else:
            self._renewed = begun
            self._follow(heard)

    def _report(self) -> HeartbeatReport:
        held = self._leases.held() if self._leases is not None else []
        urgent = min((Priority(one) for one in held), key=lambda one: one.rank, default=None)
        now = self._status
        return HeartbeatReport(now.phase, now.loaded, now.detail, self.worker, len(held), urgent, self._stalled_for())

    def _follow(self, heard: HeartbeatReply) -> None:
        if heard.desired is Desired.PREEMPT and self._leases is not None:
            self._leases.drain()
        with contextlib.suppress(DatabaseUnreachable, LeaseLost):  # the next beat meets them, too
            self._on_beat()
        if heard.threads != self._threads:
            _log.info("threads_changed", threads=heard.threads, before=self._threads)
            self._threads = heard.threads
            self._on_threads(heard.threads)

    def _mind_the_lease(self) -> None:
        while not self._closed.wait(min(self._interval, self._lease * _LOOK)):
            silent = time.monotonic() - self._renewed
            if silent > self._lease * _GONE:
                try:
                    _log.error("claim_let_go", seconds=round(silent, 1))
                finally:
                    os._exit(LET_GO)
            if silent > self._lease * _LEAVE:
                try:
                    self._leave(f"its claim could not be renewed for {silent:.1f} s")
                except Exception:  # noqa: BLE001 the outermost loop of the thread; the next turns end the process
                    _log.exception("pool_not_left")

    def _leave(self, reason: str) -> None:
        """Hand the steps back and end. What has not begun to serve ends at once: a load cannot be stopped otherwise."""
        if not self._leaving.acquire(blocking=False):
            return
        _log.error("claim_lost", reason=reason, phase=self._status.phase)
        self._status.detail = reason
        if self._leases is None:
            os._exit(LET_GO)
        try:
            self._leases.drain()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

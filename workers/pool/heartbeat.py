"""
The heartbeat of a pool: it renews the pool's reservation, reports its status, and receives the desired state.

It runs from before the load until after the last step. A pool that serves and has no steps sends it less often.
When the reservation is lost, or could not be renewed in time, the pool requeues its steps and ends before the lease
expires. If that fails, the process exits immediately. A thread of its own does this, because the renewing thread may be
waiting for a database that does not answer.
Errors in either thread are logged; neither thread ends before the pool.
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
from app.fleet.pool import Desired, PoolPhase
from app.kernel import log
from app.kernel.errors import DatabaseUnreachable, LeaseLost
from app.kernel.priority import Priority
from workers.leases import Leases
from workers.pool.progress import Status

_log = log.get(__name__)

#: Parts of the lease without a renewal after which the pool begins to stop, and after which the process exits.
_STOP, _EXIT = 0.7, 0.9
#: The part of the lease between two checks of that.
_CHECK = 0.05
#: Exit code of a pool that ended because its reservation was lost or could not be renewed.
RESERVATION_LOST = 7


class Heartbeat:
    """The heartbeat of one pool: a thread that renews, and a thread that guards the lease."""

    def __init__(
        self,
        holder: ReservationHolder,
        grant: Grant,
        worker: str,
        status: Status,
        interval: timedelta,
        renewed: float,
        idle_interval: timedelta | None = None,
    ) -> None:
        """
        Do nothing until `start`. `renewed` is a monotonic time that is not after the grant was taken.

        `idle_interval` is that of a pool that serves and has no steps; by default it is the same.
        """
        self.grant, self.worker = grant, worker
        self._holder, self._interval = holder, interval.total_seconds()
        self._idle_interval = (idle_interval or interval).total_seconds()
        self._lease = holder.lease.total_seconds()
        self._status = status
        self._leases: Leases | None = None
        self._stalled_for: Callable[[], timedelta] = lambda: timedelta(0)
        self._renewed = renewed
        self._stopping = threading.Lock()
        self._closed = threading.Event()
        #: Items trigger a heartbeat. A SimpleQueue may be filled by a signal handler at any moment.
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._threads = grant.threads
        self._on_threads: Callable[[int], None] = lambda _: None
        self._on_renewed: Callable[[], None] = lambda: None
        #: Steps of the last report.
        self._reported = 0
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._guard = threading.Thread(target=self._guard_lease, name="lease-guard", daemon=True)

    def start(self) -> None:
        """Start the threads. From now on each change of the phase is reported immediately."""
        self._status.on_change = lambda: self._wake.put(None)
        self._thread.start()
        self._guard.start()

    def serve(self, leases: Leases, stalled_for: Callable[[], timedelta]) -> None:
        """Add the leases of the steps, and the progress of the engine, to the heartbeats from now on."""
        self._leases, self._stalled_for = leases, stalled_for

    def on_threads(self, action: Callable[[int], None]) -> None:
        """Set the function that is called with the new number of threads when it changes."""
        self._on_threads = action

    def on_renewed(self, action: Callable[[], None]) -> None:
        """Set the function that is called after each renewal. It may raise DatabaseUnreachable and LeaseLost."""
        self._on_renewed = action

    def stop(self) -> None:
        """Send a last heartbeat, and stop."""
        self._closed.set()
        self._wake.put(None)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while True:
            closing = self._closed.is_set()
            try:
                self._renew()
            except Exception:  # noqa: BLE001 the outermost loop of the thread; the guard notices a missing renewal
                _log.exception("heartbeat_failed")
            if closing:
                return
            with contextlib.suppress(Empty):
                self._wake.get(timeout=self._idle_interval if self._is_idle() else self._interval)

    def _is_idle(self) -> bool:
        return self._leases is not None and self._status.phase is PoolPhase.SERVING and not self._leases.held()

    def _renew(self) -> None:
        """Send one heartbeat."""
        begun = time.monotonic()
        try:
            reply = self._holder.renew(self.grant.id, self.grant.epoch, self._report())
        except LeaseLost as error:
            self._stop_pool(str(error))
        except DatabaseUnreachable as error:
            _log.warning("reservation_not_renewed", error=str(error))
        else:
            self._renewed = begun
            self._apply(reply)

    def _report(self) -> HeartbeatReport:
        held = self._leases.held() if self._leases is not None else []
        urgent = min((Priority(one) for one in held), key=lambda one: one.rank, default=None)
        count = self._leases.count if self._leases is not None else 0
        used, self._reported = count > self._reported, count
        now = self._status
        return HeartbeatReport(
            now.phase, now.loaded, now.detail, self.worker, len(held), used, urgent, self._stalled_for()
        )

    def _apply(self, reply: HeartbeatReply) -> None:
        if reply.desired is Desired.PREEMPT and self._leases is not None:
            self._leases.drain()
        with contextlib.suppress(DatabaseUnreachable, LeaseLost):  # the next renewal raises them again
            self._on_renewed()
        if reply.threads != self._threads:
            _log.info("threads_changed", threads=reply.threads, before=self._threads)
            self._threads = reply.threads
            self._on_threads(reply.threads)

    def _guard_lease(self) -> None:
        while not self._closed.wait(min(self._interval, self._lease * _CHECK)):
            silent = time.monotonic() - self._renewed
            if silent > self._lease * _EXIT:
                try:
                    _log.error("reservation_not_renewed_in_time", seconds=round(silent, 1))
                finally:
                    os._exit(RESERVATION_LOST)
            if silent > self._lease * _STOP:
                try:
                    self._stop_pool(f"its reservation could not be renewed for {silent:.1f} s")
                except Exception:  # noqa: BLE001 the outermost loop of the thread; a later iteration exits the process
                    _log.exception("pool_not_stopped")

    def _stop_pool(self, reason: str) -> None:
        """Requeue the steps and end. A pool that does not serve yet exits immediately: a load cannot be cancelled."""
        if not self._stopping.acquire(blocking=False):
            return
        _log.error("reservation_lost", reason=reason, phase=self._status.phase)
        self._status.detail = reason
        if self._leases is None:
            os._exit(RESERVATION_LOST)
        try:
            self._leases.drain()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

"""
Preemption in a pool: steps of the class `batch` are requeued when more urgent ones wait in the queue of the model.

A pool has a thread for each slot. While steps of the class `batch` have all of them, and stand still or write long
texts, no other step could begin; direct requests need no thread (`direct.py`). A step that was requeued begins again
later, in this pool or another one: what it has written is lost, and nothing else.
A message that is taken at once preempts nothing: it has to be seen waiting twice.
"""

from __future__ import annotations

import threading

import redis

from app.fleet.pool import PoolPhase
from app.inference.requests import PriorityClass
from app.kernel import broker, log
from workers.leases import Leases

_log = log.get(__name__)

#: Seconds between two looks while steps are held.
_INTERVAL = 0.25
#: Seconds after an error of the broker.
_PAUSE = 2.0


class Preemption:
    """The preemption of one pool, on a thread of its own while it serves."""

    def __init__(self, leases: Leases, redis_url: str, queue: str) -> None:
        """Does nothing before the phase SERVING."""
        self._leases, self._queue = leases, queue
        self._redis = broker.connect(redis_url)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="preemption", daemon=True)

    def on_phase(self, phase: PoolPhase) -> None:
        """Begin, or end: a pool that drains takes no more steps."""
        if phase is PoolPhase.SERVING:
            self._thread.start()
        elif phase in (PoolPhase.DRAINING, PoolPhase.UNLOADING):
            self._ended.set()

    def close(self) -> None:
        """End the thread. The leases are closed before that."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        self._redis.close()

    def _run(self) -> None:
        waited = 0
        while not self._ended.wait(_INTERVAL):
            self._leases.wait_for_steps()
            try:
                waited = self.look(waited)
            except redis.RedisError as error:
                waited = 0
                _log.debug("preemption_postponed", error=str(error))
                self._ended.wait(_PAUSE)
            except Exception:  # noqa: BLE001 the outermost loop of the thread
                _log.exception("preemption_interrupted")
                self._ended.wait(_PAUSE)

    def look(self, waited: int) -> int:
        """
        Requeue steps for those that wait now and did in the last look, when there were `waited`.

        Returns how many wait now.
        """
        if PriorityClass.BATCH not in self._leases.held():
            return 0
        waiting = broker.waiting_before(self._redis, self._queue, PriorityClass.BATCH)
        stopped = self._leases.preempt(PriorityClass.BATCH, min(waited, waiting))
        if stopped:
            _log.info("steps_preempted", stopped=stopped, waiting=waiting)
        return waiting

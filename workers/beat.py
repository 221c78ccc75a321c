"""
Beat: RedBeat's clock, one of several by a lock in the broker, which outlives the broker's faults.

A broker that goes away is waited for; one that lost its data gets lock and schedule anew.
Whoever takes the lock writes the schedule: a stand-by may have waited while it was lost.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from redbeat.schedulers import RedBeatScheduler, acquire_distributed_beat_lock
from redis.exceptions import LockError, RedisError

from app.kernel import log

_log = log.get(__name__)


class Scheduler(RedBeatScheduler):  # type: ignore[misc] # it has no type hints
    """RedBeat's scheduler. It alone would end when it lost the lock, and a stand-by would tick an empty schedule."""

    #: The lock while this beat has it, or tries to keep it.
    lock: Any = None
    #: The lock under which the schedule was written last.
    _written_under: Any = None

    def setup_schedule(self) -> None:
        """Nothing yet: the schedule is written once the lock is had."""

    def tick(self, *args: Any, **kwargs: Any) -> float:
        """Send what is due; gives the seconds until the next tick."""
        try:
            if self.lock is None:
                acquire_distributed_beat_lock(sender=SimpleNamespace(scheduler=self))
            if self.lock is not self._written_under:
                super().setup_schedule()
                self._written_under = self.lock
                _log.info("beat_leads")
            seconds: float = super().tick(*args, **kwargs)
        except RedisError as error:
            _log.warning("beat_interrupted", error=str(error))
            if isinstance(error, LockError):
                self.lock = None
            return float(self.max_interval)
        return seconds

    def close(self) -> None:
        """Give the lock back; it ends by itself when the broker is away."""
        try:
            super().close()
        except RedisError as error:
            _log.warning("beat_lock_not_released", error=str(error))

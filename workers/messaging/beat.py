"""
Beat: RedBeat's clock, one of several by a lock in the broker, which outlives the broker's faults.

A broker that goes away is waited for; one that lost its data gets lock and schedule anew.
Whoever takes the lock writes the schedule: a stand-by may have waited while it was lost.
The schedule follows from the settings. Where its keys hold something else, that is put aside and they are written anew.
"""

from __future__ import annotations

from typing import Any

import redis
from celery.signals import beat_init
from redbeat import schedulers
from redbeat.schedulers import RedBeatScheduler, get_redis
from redis.exceptions import LockError, RedisError, ResponseError

from app.kernel import clock, log
from app.kernel.dead_letters import DeadLetters, Reason

_log = log.get(__name__)

# It would wait for the lock without an end, whatever lies in its place. Each tick tries to take it instead.
beat_init.disconnect(schedulers.acquire_distributed_beat_lock)


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
            if self.lock is None and not self._lead():
                return float(self.max_interval)
            if self.lock is not self._written_under:
                super().setup_schedule()
                self._written_under = self.lock
                _log.info("beat_leads")
            seconds: float = super().tick(*args, **kwargs)
        except ResponseError as error:
            _log.warning("beat_interrupted", error=str(error))
            self._mend(f"{error}")
        except RedisError as error:
            _log.warning("beat_interrupted", error=str(error))
            if isinstance(error, LockError):
                self.lock = None
        except Exception as error:  # noqa: BLE001 the outermost loop: whatever the keys hold, it ticks again
            _log.exception("schedule_unreadable")
            self._mend(f"{type(error).__name__}: {error}")
        else:
            return seconds
        return float(self.max_interval)

    def close(self) -> None:
        """Give the lock back; it ends by itself when the broker is away."""
        try:
            super().close()
        except RedisError as error:
            _log.warning("beat_lock_not_released", error=str(error))

    @property
    def schedule(self) -> dict[str, Any]:
        """What is due of our own entries. Raises ValueError for what RedBeat would pass over in silence, for ever."""
        try:
            found: dict[str, Any] = super().schedule
        except RecursionError as error:
            raise ValueError(f"an entry is nested too deeply: {error}") from None
        return {name: entry for name, entry in found.items() if name in self.app.redbeat_conf.schedule}

    def _lead(self) -> bool:
        """Take the lock, if nobody has it. Something else in its place is put aside: it would be there for ever."""
        client = get_redis(self.app)
        lock = client.lock(self.lock_key, timeout=self.lock_timeout)
        lock.lua_extend = client.register_script(schedulers.LUA_EXTEND_TO_SCRIPT)
        if lock.acquire(blocking=False):
            self.lock = lock
            return True
        if client.pttl(self.lock_key) == -1:
            found = f"{client.type(self.lock_key)} without an end"
            self._dead_letters().put_key(clock.now(), self.lock_key, found, "lock")
        return False

    def _mend(self, why: str) -> None:
        """Put aside what the schedule cannot be read from, so that the next tick writes it anew."""
        conf = self.app.redbeat_conf
        expected = {self.lock_key: "string", conf.schedule_key: "zset", conf.statics_key: "set"}
        try:
            client, dead = get_redis(self.app), self._dead_letters()
            wrong, rest = 0, []
            for name in client.scan_iter(f"{conf.key_prefix}*", count=1000):
                found = client.type(name)
                if found not in (expected.get(name, "hash"), "none"):
                    dead.put_key(clock.now(), name, found, expected.get(name, "hash"))
                    wrong += 1
                elif name != self.lock_key:
                    rest.append(name)
            if not wrong and rest:
                dead.put(clock.now(), conf.schedule_key, Reason.UNREADABLE, why, b"")
                client.unlink(*rest)
        except RedisError as error:
            _log.warning("beat_interrupted", error=str(error))
        self._written_under = None

    def _dead_letters(self) -> DeadLetters:
        return DeadLetters(redis.Redis.from_url(self.app.conf.redbeat_redis_url, protocol=2, socket_timeout=10))

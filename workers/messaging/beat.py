"""
The scheduler of beat: RedBeat's, made to survive faults of the broker.

A lock in the broker elects one of several beats; the others stand by.
While the broker is unavailable, beat waits. When the broker has lost its data, beat takes the lock and writes the
schedule again.
Beat writes the schedule each time that it takes the lock: the schedule may have been lost while it stood by.
When the clock has gone back, entries that lie further ahead than their interval are due at once, whoever wrote them.
While nothing happens in the installation, beat triggers the jobs less often (`app/kernel/activity.py`).
The schedule follows from the settings and from what operators have changed. Keys that contain anything else become
dead letters and are written again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

import redis
from celery import Celery
from celery.beat import Service
from celery.signals import beat_init
from redbeat import schedulers
from redbeat.schedulers import RedBeatScheduler, get_redis
from redis.exceptions import LockError, RedisError, ResponseError

from app.kernel import clock, log
from app.kernel.activity import Activity
from app.kernel.dead_letters import DeadLetters, Reason

_log = log.get(__name__)

#: While nothing happens, beat ticks after that many times the shortest interval.
_QUIET = 10
#: The part of the lock's time after which it is extended meanwhile.
_EXTEND = 0.3

#: The attribute of the application with the changes that its beats follow.
_FOLLOWED = "followed_changes"

#: Seconds by which the clock may go back, or an entry lie ahead of its interval, before the entries are mended.
_CLOCK_TOLERANCE = 1.0

#: Seconds to wait for a beat on a thread to release its lock, and until a failed one starts again.
_STOP_SECONDS, _RETRY_SECONDS = 5.0, 1.0

# RedBeat would wait for the lock without a limit, even when its key has another type. Here each tick tries once.
beat_init.disconnect(schedulers.acquire_distributed_beat_lock)


class ScheduleChanges(Protocol):
    """What operators have changed of the schedule."""

    #: Rises with each change.
    version: int

    def schedule(self) -> dict[str, Any]:
        """Return the schedule with the changes."""


def follow(app: Celery, changes: ScheduleChanges) -> None:
    """Make the beats of an application follow changes."""
    setattr(app, _FOLLOWED, changes)


class Scheduler(RedBeatScheduler):  # type: ignore[misc] # RedBeat has no type hints
    """
    RedBeat's scheduler, which continues after it lost the lock and rewrites the schedule when it takes the lock.

    RedBeat itself ends when it loses the lock, and a stand-by that takes over ticks an empty schedule.
    """

    #: The lock, while this beat holds it or tries to extend it.
    lock: Any = None
    #: The lock under which the schedule was last written.
    _written_under: Any = None
    #: When the due entries were last sent, by the monotonic clock.
    _ticked: float = 0.0
    #: When the lock was last extended, by the monotonic clock.
    _extended: float = 0.0
    #: How far the wall clock was ahead of the monotonic one at the last tick, in seconds.
    _clock_offset = float("inf")
    #: The version of the changes that the schedule contains.
    _version = 0

    @cached_property
    def _activity(self) -> Activity:
        return Activity(self.app.conf.redbeat_redis_url)

    def setup_schedule(self) -> None:
        """Do nothing: `tick` writes the schedule once it holds the lock."""

    def tick(self, *args: Any, **kwargs: Any) -> float:
        """Send the due entries. Returns the seconds until the next tick."""
        try:
            self._apply_changes()
            if self._may_pause():
                self._keep_lock()
                return self._shortest
            if self.lock is None and not self._take_lock():
                return float(self.max_interval)
            if self.lock is not self._written_under:
                super().setup_schedule()
                self._written_under = self.lock
                self._clock_offset = float("inf")
                _log.info("beat_elected")
            self._check_clock()
            self._ticked = self._extended = time.monotonic()
            seconds: float = super().tick(*args, **kwargs)
        except ResponseError as error:
            _log.warning("beat_interrupted", error=str(error))
            self._repair(f"{error}")
        except RedisError as error:
            _log.warning("beat_interrupted", error=str(error))
            if isinstance(error, LockError):
                self.lock = None
        except Exception as error:  # noqa: BLE001 the outermost loop: it ticks again, whatever the keys contain
            _log.exception("schedule_unreadable")
            self._repair(f"{type(error).__name__}: {error}")
        else:
            return seconds
        return float(self.max_interval)

    def _apply_changes(self) -> None:
        """Have the schedule written again when an operator has changed a job."""
        changes: ScheduleChanges | None = getattr(self.app, _FOLLOWED, None)
        if changes is None or changes.version == self._version:
            return
        self._version = changes.version
        self.app.conf.beat_schedule = changes.schedule()
        self._written_under = None

    def _check_clock(self) -> None:
        """Mend the entries when the wall clock has gone back, or when they may be those of another clock."""
        offset = clock.now().timestamp() - time.monotonic()
        if offset < self._clock_offset - _CLOCK_TOLERANCE:
            self._mend_future()
        # Not before they are mended: without the broker, the next tick tries again.
        self._clock_offset = offset

    def _mend_future(self) -> None:
        """
        Make entries due that lie further ahead than their interval.

        They were sent when this clock, or that of another beat, was ahead. They would be sent when that time has come,
        which may be hours away, and nothing would be recovered until then.
        """
        conf, client, now = self.app.redbeat_conf, get_redis(self.app), clock.now().timestamp()
        scores: dict[str, float] = dict(client.zrange(conf.schedule_key, 0, -1, withscores=True))
        late = []
        for name, entry in conf.schedule.items():
            key = self.Entry.generate_key(self.app, name)
            if scores.get(key, 0.0) > now + entry["schedule"].total_seconds() + _CLOCK_TOLERANCE:
                late.append(name)
                # Without the instant of its last run it is due now; the tick writes the next one.
                client.hdel(key, "meta")
                client.zadd(conf.schedule_key, {key: now})
        if late:
            _log.warning("clock_has_gone_back", entries=late)

    def _keep_lock(self) -> None:
        now = time.monotonic()
        if now - self._extended > self.lock_timeout * _EXTEND:
            self.lock.extend(int(self.lock_timeout))
            self._extended = now

    @property
    def _shortest(self) -> float:
        """The shortest interval of an entry, in seconds; at most the longest pause of beat."""
        intervals = [entry["schedule"].total_seconds() for entry in self.app.conf.beat_schedule.values()]
        return float(min([*intervals, self.max_interval]))

    def _may_pause(self) -> bool:
        """Whether this beat has ticked a moment ago, and nothing has happened since."""
        if self.lock is None or self.lock is not self._written_under:
            return False
        return time.monotonic() - self._ticked < self._shortest * _QUIET and self._activity.is_quiet()

    def close(self) -> None:
        """Release the lock. When the broker is unavailable, the lock expires by itself."""
        try:
            super().close()
        except RedisError as error:
            _log.warning("beat_lock_not_released", error=str(error))

    @property
    def schedule(self) -> dict[str, Any]:
        """
        The due entries that the settings define.

        Raises ValueError for an entry that RedBeat could never read and would skip silently.
        """
        try:
            found: dict[str, Any] = super().schedule
        except RecursionError as error:
            raise ValueError(f"an entry is nested too deeply: {error}") from None
        return {name: entry for name, entry in found.items() if name in self.app.redbeat_conf.schedule}

    def _take_lock(self) -> bool:
        """
        Try to take the lock; return whether it was taken.

        A key in its place without a time to live is made a dead letter: it would never expire.
        """
        client = get_redis(self.app)
        lock = client.lock(self.lock_key, timeout=self.lock_timeout)
        lock.lua_extend = client.register_script(schedulers.LUA_EXTEND_TO_SCRIPT)
        if lock.acquire(blocking=False):
            self.lock = lock
            return True
        if client.pttl(self.lock_key) == -1:
            found = f"{client.type(self.lock_key)} without a time to live"
            self._dead_letters().put_key(clock.now(), self.lock_key, found, "lock")
        return False

    def _repair(self, reason: str) -> None:
        """Make the unreadable keys of the schedule dead letters, so that the next tick writes them again."""
        conf = self.app.redbeat_conf
        expected = {self.lock_key: "string", conf.schedule_key: "zset", conf.statics_key: "set"}
        try:
            client, dead_letters = get_redis(self.app), self._dead_letters()
            wrong_types, others = 0, []
            for name in client.scan_iter(f"{conf.key_prefix}*", count=1000):
                found = client.type(name)
                if found not in (expected.get(name, "hash"), "none"):
                    dead_letters.put_key(clock.now(), name, found, expected.get(name, "hash"))
                    wrong_types += 1
                elif name != self.lock_key:
                    others.append(name)
            if not wrong_types and others:
                dead_letters.put(clock.now(), conf.schedule_key, Reason.UNREADABLE, reason, b"")
                client.unlink(*others)
        except RedisError as error:
            _log.warning("beat_interrupted", error=str(error))
        self._written_under = None

    def _dead_letters(self) -> DeadLetters:
        return DeadLetters(redis.Redis.from_url(self.app.conf.redbeat_redis_url, protocol=2, socket_timeout=10))


@contextmanager
def running(app: Celery) -> Iterator[None]:
    """Run a beat on a thread until the end of the block; then its lock is free for another one."""
    stopped = threading.Event()
    services: list[Service] = []

    def run() -> None:
        while not stopped.is_set():
            try:
                services[:] = [Service(app, scheduler_cls=Scheduler)]
                services[0].start()
            except Exception:  # noqa: BLE001 the outermost loop of the thread
                _log.exception("beat_failed")
                stopped.wait(_RETRY_SECONDS)

    thread = threading.Thread(target=run, name="beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        for service in services:
            service.stop()
        thread.join(_STOP_SECONDS)

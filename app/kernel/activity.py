"""
Activity: whether anything happens in an installation, so that beat can trigger the scheduled jobs less often while not.

Whoever starts something notes it in the broker: the API for each request that changes something, workers for each step,
agents when a process ends, and the jobs themselves while there is something that they may have to act on soon.
It is a hint. Without the keys (a new broker, or one that lost its data), and while the broker is unavailable, the
installation counts as active; and a quiet one is still checked, only less often.

Redis keys:
    arriero:activity         exists while something happened within the last seconds
    arriero:activity:known   exists once activity has been noted at all
"""

from __future__ import annotations

import threading
import time

import redis

from app.kernel import broker, log

_log = log.get(__name__)

_RECENT, _KNOWN = "arriero:activity", "arriero:activity:known"
#: Milliseconds for which one note lasts.
_LASTS = 5_000
#: Least seconds between two notes of a process.
_PAUSE = 1.0


class Activity:
    """The activity of an installation, as its broker has it."""

    def __init__(self, redis_url: str) -> None:
        """Does not connect."""
        self._redis = broker.connect(redis_url)
        self._lock = threading.Lock()
        self._noted = float("-inf")
        #: Whether a thread writes the keys.
        self._writing = False
        self._closed = threading.Event()

    def note(self) -> None:
        """Note that something happens. Returns at once, in any thread; a broker that is unavailable does not matter."""
        now = time.monotonic()
        with self._lock:
            if now - self._noted < _PAUSE:
                return
            self._noted = now
            if self._writing:
                return
            self._writing = True
        threading.Thread(target=self._write, name="activity", daemon=True).start()

    def is_quiet(self) -> bool:
        """Whether nothing has happened within the last seconds. False when that is not known."""
        try:
            recent, known = self._redis.mget(_RECENT, _KNOWN)
        except redis.RedisError:
            return False
        return recent is None and known is not None

    def close(self) -> None:
        """Close the connections."""
        self._closed.set()
        self._redis.close()

    def _write(self) -> None:
        """Write the keys; while the broker is unavailable, try again: what was started then is pending."""
        try:
            while not self._closed.is_set():
                try:
                    with self._redis.pipeline(transaction=False) as pipeline:
                        pipeline.set(_RECENT, 1, px=_LASTS)
                        pipeline.set(_KNOWN, 1)
                        pipeline.execute()
                except redis.RedisError as error:
                    _log.debug("activity_not_noted", error=str(error))
                    self._closed.wait(_PAUSE)
                else:
                    return
        finally:
            self._writing = False

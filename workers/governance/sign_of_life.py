"""The sign of life of a control worker, which a thread renews. See `app/governance/health/signs.py`."""

from __future__ import annotations

import threading
from collections.abc import Callable

import redis

from app.governance.health import signs
from app.kernel import broker, log

_log = log.get(__name__)


class SignOfLife:
    """The sign of this process."""

    def __init__(self, redis_url: str, owner: str, idle_seconds: Callable[[], float]) -> None:
        """Does not connect. `idle_seconds` returns the seconds since the last scheduled job."""
        self._redis = broker.connect(redis_url)
        self._key, self._idle_seconds = signs.key(owner), idle_seconds
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="sign-of-life", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Remove the sign."""
        self._closed.set()
        self._thread.join(timeout=5)
        try:
            self._redis.delete(self._key)
        except redis.RedisError:
            _log.debug("sign_of_life_not_removed")  # it expires
        self._redis.close()

    def _renew(self) -> None:
        while not self._closed.is_set():
            try:
                self._redis.set(self._key, f"{self._idle_seconds():.1f}", px=signs.LASTS)
            except redis.RedisError as error:
                _log.debug("sign_of_life_not_renewed", error=str(error))
            except Exception:  # noqa: BLE001 the outermost loop of the thread
                _log.exception("sign_of_life_failed")
            self._closed.wait(signs.RENEWED.total_seconds())

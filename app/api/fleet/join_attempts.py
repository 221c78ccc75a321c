"""How often hosts may try to join at one process: a bound on work for strangers, since nobody guesses a token."""

from __future__ import annotations

import threading
import time
from collections import deque

from app.kernel.errors import ArrieroError

#: Most exchanges that are tried in a minute from one address, and from all together.
MAX_OF_ONE, MAX_OF_ALL = 30, 300


class TooManyJoins(ArrieroError):
    """More hosts tried to join within a minute than one process looks at."""


class JoinAttempts:
    """Counts the exchanges that are tried in a process. Safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tried: deque[tuple[float, str]] = deque(maxlen=MAX_OF_ALL)

    def count(self, address: str) -> None:
        """Count one. Raises TooManyJoins."""
        now = time.monotonic()
        with self._lock:
            while self._tried and self._tried[0][0] < now - 60:
                self._tried.popleft()
            of_one = sum(one == address for _, one in self._tried)
            if len(self._tried) >= MAX_OF_ALL or of_one >= MAX_OF_ONE:
                raise TooManyJoins(
                    f"too many hosts try to join: at most {MAX_OF_ONE} a minute from one address, {MAX_OF_ALL} from all"
                )
            self._tried.append((now, address))

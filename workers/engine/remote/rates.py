"""
The rate window of a server: how many requests and tokens were sent within the last minute, and when the next may go.

Nothing here reads a clock: the caller passes the time, in seconds of one clock.
"""

from __future__ import annotations

from collections import deque

#: Seconds for which the limits hold.
_WINDOW = 60.0


class RateWindow:
    """The requests and tokens of the last minute. Not safe for threads."""

    def __init__(self, requests: int | None, tokens: int | None) -> None:
        """The most requests and tokens of a minute; None means no limit."""
        self._requests, self._tokens = requests, tokens
        #: Time and tokens of each request, the oldest first.
        self._sent: deque[list[float]] = deque()

    def wait(self, now: float, tokens: int) -> float:
        """Return the seconds until a request of about so many tokens may be sent; 0 when it may be sent now."""
        self._forget(now)
        if self._requests is not None and len(self._sent) >= self._requests:
            oldest = self._sent[len(self._sent) - self._requests]
            return max(oldest[0] + _WINDOW - now, 0.0)
        if self._tokens is None:
            return 0.0
        over = sum(used for _, used in self._sent) + min(tokens, self._tokens) - self._tokens
        for at, used in self._sent:
            if over <= 0:
                break
            over -= used
            if over <= 0:
                return max(at + _WINDOW - now, 0.0)
        return 0.0

    def send(self, now: float, tokens: int) -> list[float]:
        """Count a request of about so many tokens. Returns its record, for `correct`."""
        record = [now, float(tokens)]
        self._sent.append(record)
        return record

    @staticmethod
    def correct(record: list[float], tokens: int) -> None:
        """Count the tokens that the request has really used."""
        record[1] = float(tokens)

    def _forget(self, now: float) -> None:
        while self._sent and self._sent[0][0] <= now - _WINDOW:
            self._sent.popleft()

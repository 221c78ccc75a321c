"""
Speeds of a store, as measured, and what they say: whether a state is restored sooner than its tokens are computed, and
whether there is time to save one.

Bytes and seconds. Nothing here reads a clock.
"""

from __future__ import annotations

#: Fewest tokens that are restored instead of computed, and stored. It is less than what a step costs anyway.
MIN_TOKENS = 32
#: Bytes per second until they are measured: between host memory and the cache, and from a disk with its checks.
_MEMORY_RATE, _DISK_RATE = 2e9, 2e8
#: The part of the time that saving may take while texts are written.
_SAVING_SHARE = 0.1


class Rates:
    """The measured speeds."""

    def __init__(self) -> None:
        self.save, self.restore, self.read = _MEMORY_RATE, _MEMORY_RATE, _DISK_RATE

    def note_saved(self, size: int, seconds: float) -> None:
        """Record that a state was copied from the cache."""
        self.save = _blend(self.save, size, seconds)

    def note_restored(self, size: int, seconds: float) -> None:
        """Record that a state was loaded into the cache."""
        self.restore = _blend(self.restore, size, seconds)

    def note_read(self, size: int, seconds: float) -> None:
        """Record that a state was read from a file and verified."""
        self.read = _blend(self.read, size, seconds)

    def seconds(self, size: int, *, from_file: bool) -> float:
        """Return the expected time until a state of this size is in the cache."""
        return size / self.restore + (size / self.read if from_file else 0.0)

    def is_worth(self, tokens: int, size: int, prefill_rate: float, *, from_file: bool) -> bool:
        """Whether so many tokens are restored sooner than computed. A prefill rate of 0 is not known yet."""
        if tokens < MIN_TOKENS:
            return False
        return not prefill_rate or self.seconds(size, from_file=from_file) < tokens / prefill_rate


class SavingAllowance:
    """Seconds that may be spent on saving while texts are written: a tenth of the time, at most `most` at once."""

    def __init__(self, most: float, now: float) -> None:
        self._most, self._left, self._at = most, most, now

    def permits(self, seconds: float, now: float) -> bool:
        """Whether a save that takes so long may begin now."""
        self._left = min(self._most, self._left + (now - self._at) * _SAVING_SHARE)
        self._at = now
        return seconds <= self._left

    def spend(self, seconds: float) -> None:
        """Record what a save took."""
        self._left -= seconds


def _blend(old: float, size: int, seconds: float) -> float:
    return old + (size / max(seconds, 1e-6) - old) / 4

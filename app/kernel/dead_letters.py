"""
Dead letters: what workers found in the broker and could not read, put aside so that they go on at once.

Redis keys:
    arriero:dead-letters            list: the last `KEPT` of them as JSON, the newest first
    arriero:dead-letters:counts     hash: how many there ever were, by queue and reason
    arriero:dead-letters:key:NAME   the value of the key NAME, which was of a wrong type; the last one of that name

Messages are hints: what one of them was about is in Postgres, and the sweep sends it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

import redis

from app.kernel import log
from app.kernel.errors import BrokerUnreachable

_log = log.get(__name__)

_PREFIX = "arriero:dead-letters"
_LIST, _COUNTS, _VALUES = _PREFIX, f"{_PREFIX}:counts", f"{_PREFIX}:key:"
#: So many are kept; older ones are dropped.
KEPT = 1000
#: Bytes of a message that are kept.
_BYTES = 2048


class Reason(StrEnum):
    """Why nothing could be done with it."""

    #: No UTF-8, no JSON, no message, or a body that is no base64.
    UNREADABLE = "unreadable"
    TOO_LARGE = "too_large"
    UNKNOWN_TASK = "unknown_task"
    WRONG_ARGUMENTS = "wrong_arguments"
    #: A key of the broker holds another type of value than its readers expect.
    WRONG_TYPE = "wrong_type"


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One that was put aside."""

    at: datetime
    #: Where it was found.
    queue: str
    reason: Reason
    #: What was wrong with it.
    detail: str
    #: Its length.
    bytes: int
    #: Its beginning.
    message: str


class DeadLetters:
    """Those of one broker."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def put(self, at: datetime, queue: str, reason: Reason, detail: str, message: bytes) -> None:
        """Keep a message, count it and log it. A broker that does not take it costs the record, and nothing else."""
        beginning = message[:_BYTES].decode("utf-8", "backslashreplace")
        letter = DeadLetter(at, queue, reason, detail[:500], len(message), beginning)
        _log.error("message_put_aside", queue=queue, reason=reason, detail=letter.detail, bytes=letter.bytes)
        try:
            self._mended(lambda: self._put(letter))
        except redis.RedisError as error:
            _log.warning("dead_letter_not_kept", queue=queue, error=str(error))

    def put_key(self, at: datetime, name: str, found: str, expected: str) -> None:
        """Take a key of a wrong type out of the way. Its value is kept under another name, for whoever owns it."""
        kept = f"{_VALUES}{name}"
        try:
            self._client.rename(name, kept)
        except redis.ResponseError:
            return  # somebody else was faster
        self.put(at, name, Reason.WRONG_TYPE, f"a {found}, not a {expected}; its value is kept as {kept}", b"")

    def newest(self, limit: int) -> list[DeadLetter]:
        """The newest so many. Raises BrokerUnreachable."""
        with _translated():
            found: list[bytes] = self._mended(lambda: self._client.lrange(_LIST, 0, limit - 1))
        return [letter for raw in found if (letter := _read(raw)) is not None]

    def kept(self) -> int:
        """How many are kept. Raises BrokerUnreachable."""
        with _translated():
            return int(self._mended(lambda: self._client.llen(_LIST)))

    def counts(self) -> Mapping[tuple[str, str], int]:
        """How many there ever were, by queue and reason. Raises BrokerUnreachable."""
        with _translated():
            found: dict[bytes, bytes] = self._mended(lambda: self._client.hgetall(_COUNTS))
        counts = {}
        for field, count in found.items():
            queue, _, reason = field.decode("utf-8", "replace").rpartition(" ")
            if reason in set(Reason) and count.isdigit():
                counts[queue, reason] = int(count)
        return counts

    def clear(self) -> int:
        """
        Remove what is kept, values of keys too; gives how many messages. The counts stay.

        Raises BrokerUnreachable.
        """
        with _translated():
            count = self.kept()
            self._client.unlink(_LIST)
            for name in self._client.scan_iter(f"{_VALUES}*", count=1000):
                self._client.unlink(name)
        return count

    def _put(self, letter: DeadLetter) -> None:
        with self._client.pipeline() as pipeline:
            pipeline.lpush(_LIST, json.dumps(asdict(letter), default=str))
            pipeline.ltrim(_LIST, 0, KEPT - 1)
            pipeline.hincrby(_COUNTS, f"{letter.queue} {letter.reason}", 1)
            pipeline.execute()

    def _mended(self, call: Callable[[], Any]) -> Any:
        """What a call gives. Where a key of ours is of a wrong type itself, it is dropped, and the call made again."""
        try:
            return call()
        except redis.ResponseError as error:
            if not is_wrong_type(error):
                raise
        for name, expected in ((_LIST, b"list"), (_COUNTS, b"hash")):
            if self._client.type(name) not in (expected, b"none"):
                self._client.unlink(name)
        return call()


def is_wrong_type(error: Exception) -> bool:
    """Whether the broker refused a command because of the type of a key's value."""
    return "WRONGTYPE" in str(error)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except redis.RedisError as error:
        raise BrokerUnreachable(f"the broker cannot be reached: {error}") from error


def _read(raw: bytes) -> DeadLetter | None:
    """A letter as it was kept; None for what somebody else put there."""
    try:
        found = json.loads(raw)
        return DeadLetter(
            datetime.fromisoformat(found["at"]),
            str(found["queue"]),
            Reason(found["reason"]),
            str(found["detail"]),
            int(found["bytes"]),
            str(found["message"]),
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        return None

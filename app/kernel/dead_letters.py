"""
Dead letters: messages and keys of the broker that workers could not read, moved away so that they do not block work.

Redis keys:
    arriero:dead-letters            list: the last `KEPT` dead letters as JSON, the newest first
    arriero:dead-letters:counts     hash: the number of all dead letters so far, by queue and reason
    arriero:dead-letters:key:NAME   the last value of the key NAME that had a wrong type

No work is lost with a message: the state is in Postgres, and the sweep sends the message again.
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
#: Number of dead letters that are kept; older ones are dropped.
KEPT = 1000
#: Bytes of a message that are kept.
_KEPT_BYTES = 2048


class Reason(StrEnum):
    """Why a message or key could not be used."""

    #: Not UTF-8, not JSON, not a message of Celery, or a body that is not base64.
    UNREADABLE = "unreadable"
    TOO_LARGE = "too_large"
    UNKNOWN_TASK = "unknown_task"
    WRONG_ARGUMENTS = "wrong_arguments"
    #: A key of the broker has a value of another type than its readers expect.
    WRONG_TYPE = "wrong_type"


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One unreadable message or key."""

    at: datetime
    #: The queue, or the key, where it was found.
    queue: str
    reason: Reason
    #: What was wrong with it.
    detail: str
    #: Its length in bytes.
    bytes: int
    #: Its beginning.
    message: str


class DeadLetters:
    """The dead letters of one broker."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def put(self, at: datetime, queue: str, reason: Reason, detail: str, message: bytes) -> None:
        """Store a message as a dead letter, count it and log it. When the broker is unreachable, it is only logged."""
        beginning = message[:_KEPT_BYTES].decode("utf-8", "backslashreplace")
        letter = DeadLetter(at, queue, reason, detail[:500], len(message), beginning)
        _log.error("message_dead_lettered", queue=queue, reason=reason, detail=letter.detail, bytes=letter.bytes)
        try:
            self._with_repair(lambda: self._put(letter))
        except redis.RedisError as error:
            _log.warning("dead_letter_not_stored", queue=queue, error=str(error))

    def put_key(self, at: datetime, name: str, found: str, expected: str) -> None:
        """Rename a key of a wrong type, so that its value is kept for its owner, and store a dead letter for it."""
        kept = f"{_VALUES}{name}"
        try:
            self._client.rename(name, kept)
        except redis.ResponseError:
            return  # another worker has renamed it
        self.put(at, name, Reason.WRONG_TYPE, f"a {found}, not a {expected}; its value is kept as {kept}", b"")

    def newest(self, limit: int) -> list[DeadLetter]:
        """Return the newest dead letters, at most `limit`. Raises BrokerUnreachable."""
        with _translated():
            found: list[bytes] = self._with_repair(lambda: self._client.lrange(_LIST, 0, limit - 1))
        return [letter for raw in found if (letter := _read(raw)) is not None]

    def kept(self) -> int:
        """Return the number of dead letters that are kept. Raises BrokerUnreachable."""
        with _translated():
            return int(self._with_repair(lambda: self._client.llen(_LIST)))

    def counts(self) -> Mapping[tuple[str, str], int]:
        """Return the number of all dead letters so far, by queue and reason. Raises BrokerUnreachable."""
        with _translated():
            found: dict[bytes, bytes] = self._with_repair(lambda: self._client.hgetall(_COUNTS))
        counts = {}
        for field, count in found.items():
            queue, _, reason = field.decode("utf-8", "replace").rpartition(" ")
            if reason in set(Reason) and count.isdigit():
                counts[queue, reason] = int(count)
        return counts

    def clear(self) -> int:
        """
        Remove all dead letters and all kept values of keys, and return the number of dead letters. The counts stay.

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

    def _with_repair(self, call: Callable[[], Any]) -> Any:
        """Return the result of a call. A key of this module with a wrong type is deleted, and the call repeated."""
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
        raise BrokerUnreachable(f"the broker is unreachable: {error}") from error


def _read(raw: bytes) -> DeadLetter | None:
    """Parse a stored dead letter; None for an entry that another program stored."""
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

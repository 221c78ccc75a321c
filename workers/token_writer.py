"""
The writer of token streams: the entries of all steps of this process, written to Redis by one thread.

An engine's thread never waits for Redis: it only puts an entry in a queue. Pieces of one text that wait together become
one entry. While Redis does not answer, entries wait for some seconds; then their streams are given up, and their
readers find the outcome in the database.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any
from uuid import UUID

import redis

from app.inference import token_stream
from app.inference.openai import pieces
from app.inference.requests import TextPiece
from app.inference.token_stream import EntryKind
from app.kernel import broker, log

_log = log.get(__name__)

#: Most entries that are sent at once.
_BATCH = 500
#: Seconds for which entries wait for Redis, and between two tries.
_PATIENCE, _PAUSE = 5.0, 0.2
#: Seconds for which a stream is kept while its step runs.
_RUNNING_SECONDS = 86_400
#: What Redis says of an entry whose id is not above the last one.
_STALE = "equal or smaller"


class TokenWriter:
    """Writes token streams."""

    def __init__(self, redis_url: str) -> None:
        """Does not connect before the first entry."""
        self._redis = broker.connect(redis_url)
        self._entries: SimpleQueue[_Entry | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, name="token-writer", daemon=True)
        self._thread.start()

    def open(self, run_id: UUID, step: str, attempt: int) -> TokenStream:
        """Return the stream of an attempt of a step."""
        return TokenStream(self, token_stream.key(str(run_id), step), attempt)

    def put(self, entry: _Entry) -> None:
        """Add an entry; it is written soon."""
        self._entries.put(entry)

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._entries.put(None)
        self._thread.join(timeout=_PATIENCE + 5)
        self._redis.close()

    def _write_all(self) -> None:
        closing = False
        while not closing:
            batch = [self._entries.get()]
            while len(batch) < _BATCH:
                try:
                    batch.append(self._entries.get_nowait())
                except Empty:
                    break
            closing = None in batch
            try:
                self._write(_merged([entry for entry in batch if entry is not None]))
            except Exception:  # noqa: BLE001 the outermost loop of the thread: other streams go on
                _log.exception("tokens_not_written")

    def _write(self, entries: list[_Entry]) -> None:
        until, repeated = time.monotonic() + _PATIENCE, False
        entries = [entry for entry in entries if not entry.stream.given_up]
        while entries:
            try:
                self._send(entries, repeated=repeated)
                return
            except redis.RedisError as error:
                if time.monotonic() >= until:
                    _log.warning("token_streams_given_up", error=str(error), entries=len(entries))
                    for entry in entries:
                        entry.stream.given_up = True
                    return
                repeated = True
                time.sleep(_PAUSE)

    def _send(self, entries: list[_Entry], *, repeated: bool) -> None:
        with self._redis.pipeline(transaction=False) as pipeline:
            for entry in entries:
                stream = entry.stream
                pipeline.xadd(stream.key, {entry.kind.value: entry.encoded()}, id=entry.id)
            for stream, seconds in {entry.stream: entry.keeps for entry in entries if entry.keeps}.items():
                pipeline.expire(stream.key, seconds)
            answers = pipeline.execute(raise_on_error=False)
        for entry, answer in zip(entries, answers, strict=False):
            if isinstance(answer, redis.ResponseError) and _STALE in str(answer):
                # After a lost connection, it was written the first time.
                entry.stream.given_up = entry.stream.given_up or not repeated
            elif isinstance(answer, redis.ConnectionError | redis.TimeoutError):
                raise answer
            elif isinstance(answer, Exception):
                entry.stream.given_up = True
                _log.warning("token_stream_given_up", key=entry.stream.key, error=str(answer))


class TokenStream:
    """The stream of one attempt. Any thread may write to it, one at a time."""

    def __init__(self, writer: TokenWriter, key: str, attempt: int) -> None:
        self._writer, self.key, self._attempt, self._count = writer, key, attempt, 0
        #: Nothing more is written: another attempt has begun, or Redis was away for too long.
        self.given_up = False

    def begun(self, pool: str) -> None:
        """An engine has begun the attempt."""
        self._put(EntryKind.BEGUN, pool)

    def piece(self, piece: TextPiece) -> None:
        """A piece of a text."""
        if pieces.is_plain(piece):
            self._put(EntryKind.TEXT, piece.text)
        else:
            self._put(EntryKind.PIECES, [pieces.document(piece)])

    def done(self, output: Any) -> None:
        """The attempt succeeded with an output, which is JSON."""
        self._put(EntryKind.DONE, json.dumps(output, separators=(",", ":")))

    def failed(self, reason: str, message: str) -> None:
        """The attempt failed."""
        self._put(EntryKind.FAILED, json.dumps({"reason": reason, "message": message}))

    def next_id(self) -> str:
        """The id of the next entry."""
        self._count += 1
        return f"{self._attempt}-{self._count}"

    def _put(self, kind: EntryKind, value: str | list[Any]) -> None:
        if not self.given_up:
            self._writer.put(_Entry(self, kind, value))


#: Seconds for which a stream is kept after an entry, by kind.
_KEPT: Mapping[EntryKind, int] = {
    EntryKind.BEGUN: _RUNNING_SECONDS,
    EntryKind.DONE: token_stream.KEPT_SECONDS,
    EntryKind.FAILED: token_stream.KEPT_SECONDS,
}


#: Kinds whose entries become one if they wait together.
_MERGED = (EntryKind.TEXT, EntryKind.PIECES)


@dataclass(slots=True)
class _Entry:
    """An entry that waits."""

    stream: TokenStream
    kind: EntryKind
    #: A list for pieces.
    value: Any
    #: Given when it is written, so that ids are consecutive.
    id: str = field(default="")

    def encoded(self) -> bytes:
        """The value as it is written."""
        text = self.value if isinstance(self.value, str) else json.dumps(self.value, separators=(",", ":"))
        return text.encode("utf-8", "replace")

    @property
    def keeps(self) -> int:
        """Seconds for which the stream is kept from now on; 0 for no change."""
        return _KEPT.get(self.kind, 0)


def _merged(entries: list[_Entry]) -> list[_Entry]:
    """Return the entries with their ids; pieces in a row are one entry."""
    merged: list[_Entry] = []
    last: dict[str, _Entry] = {}
    for entry in entries:
        before = last.get(entry.stream.key)
        if before is not None and before.stream is entry.stream and before.kind is entry.kind and entry.kind in _MERGED:
            before.value += entry.value
            continue
        last[entry.stream.key] = entry
        merged.append(entry)
    for entry in merged:
        entry.id = entry.stream.next_id()
    return merged

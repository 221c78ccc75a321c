"""
Token streams: the text of a step while it is being written, as a Redis stream that any number of readers follow.

Redis keys:
    arriero:tokens:<run>:<step>   stream: the entries of one step; it expires some minutes after its last entry

An entry has the id `<attempt>-<n>`, with n counting from 1: ids of an attempt are consecutive, so a reader sees a
lost or doubled entry, and Redis refuses the entries of a stale attempt. A reader that has lost its connection goes on
after the last id that it got.
The stream is a view of a step. Its outcome is in the database; a lost Redis costs only what was not yet read.

Nothing here connects to Redis.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

#: Seconds for which a stream is kept after its last entry.
KEPT_SECONDS = 600
#: The id before the first entry.
START = "0-0"


class EntryKind(StrEnum):
    """What an entry says; the name of its field."""

    #: An engine has begun an attempt. The value is the id of the pool.
    BEGUN = "begun"
    #: A piece of the first text, and nothing else.
    TEXT = "text"
    #: Pieces of several texts, or with log-probabilities or tool calls, as a JSON list of the form of
    #: `app.inference.openai.pieces`.
    PIECES = "pieces"
    #: The attempt succeeded. The value is its output as JSON.
    DONE = "done"
    #: The attempt failed. The value is an object with `reason` and `message`.
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class StreamEntry:
    """An entry of a token stream."""

    #: `<attempt>-<n>`.
    id: str
    kind: EntryKind
    value: str

    @property
    def attempt(self) -> int:
        """The attempt that wrote it."""
        return int(self.id.partition("-")[0])

    @property
    def is_text(self) -> bool:
        """Whether it has text for the client."""
        return self.kind in (EntryKind.TEXT, EntryKind.PIECES)

    def json(self) -> Any:
        """The value of an entry that holds JSON."""
        return json.loads(self.value)


def key(run_id: str, step: str) -> str:
    """The key of the stream of a step."""
    return f"arriero:tokens:{run_id}:{step}"


def read_entry(id_: bytes, fields: Mapping[bytes, bytes]) -> StreamEntry | None:
    """An entry as Redis returns it; None for one of another version of Arriero."""
    for name, value in fields.items():
        try:
            return StreamEntry(id_.decode(), EntryKind(name.decode()), value.decode("utf-8", "replace"))
        except ValueError:
            continue
    return None

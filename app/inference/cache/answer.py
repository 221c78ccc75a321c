"""
A cached answer: the entries of the token stream that had it, so that a hit streams as the first call did.

The document of a hit is a new answer with the old content: it has an id and a time of its own, the token counts of the
computation, and all tokens of its prompt count as cached.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from app.inference.token_stream import EntryKind, StreamEntry


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """An answer, and the run that computed it."""

    run_id: str
    entries: tuple[tuple[EntryKind, str], ...]

    @staticmethod
    def of(run_id: str, entries: Sequence[StreamEntry]) -> CachedAnswer | None:
        """The answer of a stream that has ended; None when it did not succeed."""
        if not entries or entries[-1].kind is not EntryKind.DONE:
            return None
        last = entries[-1].attempt
        own = (entry for entry in entries if entry.attempt == last and entry.kind is not EntryKind.BEGUN)
        return CachedAnswer(run_id, tuple((entry.kind, entry.value) for entry in own))

    def encoded(self) -> bytes:
        """The answer as Redis keeps it."""
        content = [self.run_id, [[kind.value, value] for kind, value in self.entries]]
        return json.dumps(content, separators=(",", ":")).encode()

    @staticmethod
    def decoded(value: bytes) -> CachedAnswer | None:
        """The answer; None for one of another form."""
        try:
            run_id, entries = json.loads(value)
            return CachedAnswer(str(run_id), tuple((EntryKind(kind), str(content)) for kind, content in entries))
        except (ValueError, TypeError, RecursionError):
            return None

    def stream(self, call_id: str, created: int) -> Iterator[StreamEntry]:
        """The entries for another call. `created` is in seconds since 1970."""
        for number, (kind, value) in enumerate(self.entries, 1):
            entry = StreamEntry(f"1-{number}", kind, value)
            yield readdressed(entry, call_id, created) if kind is EntryKind.DONE else entry


def readdressed(entry: StreamEntry, call_id: str, created: int) -> StreamEntry:
    """The last entry of an answer, for another call than the one that computed it."""
    document: Any = entry.json()
    if isinstance(document, dict):
        if isinstance(document.get("id"), str):
            document["id"] = f"{document['id'].partition('-')[0]}-{call_id.replace('-', '')}"
            document["created"] = created
        usage = document.get("usage")
        if isinstance(usage, dict) and "prompt_tokens_details" in usage:
            usage["prompt_tokens_details"] = {"cached_tokens": usage["prompt_tokens"]}
    return StreamEntry(entry.id, entry.kind, json.dumps(document, separators=(",", ":")))

"""
A memory: one short statement that holds from an instant on, for a user of a namespace or for all of it.

Its text never changes. When it no longer holds it gets an end (`invalid_at`), and where another memory has taken its
place, that one's id. Every memory says where it comes from: messages, a run, or somebody who wrote it.

The caller passes every instant and every id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from app.kernel.errors import InvalidInput, Problem
from app.kernel.security import texts
from app.memory.memories.kinds import MAX_SOURCES, MAX_TEXT, MAX_USER, MemoryKind, MemoryOrigin

#: The prefix of the ids of memories.
PREFIX = "mem_"


@dataclass(frozen=True, slots=True)
class MemorySource:
    """Where a memory comes from: a message of a conversation, a run, or an author."""

    origin: MemoryOrigin
    #: Who wrote it: the name of a caller or a model, or the role of a message.
    author: str = ""
    conversation_id: UUID | None = None
    message_id: UUID | None = None
    run_id: UUID | None = None


@dataclass(frozen=True, slots=True)
class NewMemory:
    """A memory that is to be written."""

    text: str
    kind: MemoryKind = MemoryKind.FACT
    #: Whose it is; None for all users of the namespace.
    user: str | None = None
    #: The conversation that it comes from.
    conversation_id: UUID | None = None
    sources: Sequence[MemorySource] = ()
    #: From when on it holds; None for now.
    valid_from: datetime | None = None
    #: How much it matters, and how sure it is, from 0 to 1.
    importance: float = 0.5
    confidence: float = 1.0


@dataclass(frozen=True, slots=True)
class Memory:
    """A memory as it is stored."""

    id: UUID
    namespace: str
    user: str | None
    conversation_id: UUID | None
    kind: str
    text: str
    importance: float
    confidence: float
    valid_from: datetime
    #: It holds until then; None: it holds.
    invalid_at: datetime | None
    #: The memory that took its place.
    superseded_by: UUID | None
    created_at: datetime
    #: When it was last part of a prompt or of an answer to a search, and how often it was.
    last_used_at: datetime | None
    uses: int
    sources: Sequence[MemorySource] = field(default=())

    def holds_at(self, instant: datetime) -> bool:
        """Whether it holds at an instant."""
        return self.valid_from <= instant and (self.invalid_at is None or instant < self.invalid_at)


@dataclass(frozen=True, slots=True)
class MemoryHistoryEntry:
    """Something that happened to a memory."""

    memory_id: UUID
    event: str
    at: datetime
    author: str
    #: Why, in words.
    note: str
    #: The memory that took its place, or the kind that it had before.
    detail: str


def checked(new: NewMemory) -> NewMemory:
    """Return the memory with its text trimmed. Raises InvalidInput."""
    found: list[Problem] = []
    text = new.text.strip()
    if not text:
        found.append(Problem("text", "it is empty", "a short statement"))
    elif len(text) > MAX_TEXT:
        found.append(Problem("text", f"it has {len(text)} characters", f"at most {MAX_TEXT}: one statement"))
    for name, given, most in (("text", text, MAX_TEXT), ("user", new.user or "", MAX_USER)):
        if texts.storable(given) != given:
            found.append(Problem(name, "it holds NUL or half a character", "any other text"))
        if name == "user" and len(given) > most:
            found.append(Problem(name, f"it has {len(given)} characters", f"at most {most}"))
    if new.user is not None and not new.user.strip():
        found.append(Problem("user", "it is empty", "a name, or none at all for the whole namespace"))
    for name, number in (("importance", new.importance), ("confidence", new.confidence)):
        if not 0 <= number <= 1:
            found.append(Problem(name, f"{number:g} is out of range", "0 to 1"))
    if len(new.sources) > MAX_SOURCES:
        found.append(Problem("sources", f"there are {len(new.sources)}", f"at most {MAX_SOURCES}"))
    if new.valid_from is not None and new.valid_from.tzinfo is None:
        found.append(Problem("valid_from", "it has no time zone", "an instant such as 2026-11-21T09:00:00Z"))
    if found:
        raise InvalidInput(found, "memory")
    return NewMemory(
        text,
        new.kind,
        new.user,
        new.conversation_id,
        tuple(new.sources),
        new.valid_from,
        new.importance,
        new.confidence,
    )

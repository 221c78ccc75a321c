"""
What can be done with memories: remember, look, end, supersede, mark.

A memory that is remembered twice exists once. A memory that ends keeps its text and its place; deleting it for real is
`forgetting.py`. Everything is bound to a namespace; memories of another one are not found. `None` as a namespace means
any.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from app.files.file import parsed_id, shown_id
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import Conflict, InvalidInput, NotFound, Problem
from app.kernel.security import texts
from app.memory.conversations import store as conversation_store
from app.memory.conversations.conversation import CONVERSATION_PREFIX
from app.memory.conversations.message import MESSAGE_PREFIX
from app.memory.memories import store
from app.memory.memories.kinds import (
    MAX_AUTHOR,
    MAX_NOTE,
    MAX_SOURCES,
    MemoryEvent,
    MemoryKind,
    MemoryOrigin,
    text_hash,
)
from app.memory.memories.memory import PREFIX, Memory, MemoryHistoryEntry, MemorySource, NewMemory, checked
from app.memory.memories.store import MemoryFilter

#: Most memories of a chain that a history shows.
_LONGEST_CHAIN = 1_000
#: How far the clock of a client may be ahead.
_SKEW = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class Remembered:
    """The memory that answers a request to remember something."""

    memory: Memory
    #: False: one that holds says the same.
    created: bool


@dataclass(frozen=True, slots=True)
class MemoryPage:
    """A part of a list of memories, the newest first."""

    memories: list[Memory]
    has_more: bool


@dataclass(frozen=True, slots=True)
class MemoryHistory:
    """The memories that took each other's place, the oldest first, and what happened to them."""

    memories: list[Memory]
    entries: list[MemoryHistoryEntry]


def shown(id_: UUID) -> str:
    """Return the id of a memory as the API shows it."""
    return shown_id(id_, PREFIX)


def remember(
    database: Database,
    new: NewMemory,
    namespace: str,
    author: str,
    *,
    supersedes: str | None = None,
    note: str = "",
) -> Remembered:
    """
    Write a memory; one that says the same is returned instead. With `supersedes`, that one ends where this one begins.

    Raises InvalidInput, NotFound and Conflict.
    """
    with database.work() as work:
        return remember_in(work, new, namespace, author, supersedes=supersedes, note=note)


def remember_in(
    work: UnitOfWork,
    new: NewMemory,
    namespace: str,
    author: str,
    *,
    supersedes: str | None = None,
    note: str = "",
) -> Remembered:
    """
    As `remember`, in a transaction of the caller, which excludes others that write memories of the same user.

    A caller that holds the lock of a memory already can wait for a transaction that waits for it.
    """
    new, author, note = checked(new), _author(author), _note(note)
    _require_past(work, "valid_from", new.valid_from)
    replaced = None if supersedes is None else parsed_id(supersedes, PREFIX)
    store.lock(work, namespace, new.user, new.text, replaced)
    old = None if supersedes is None else _require(work, supersedes, namespace)
    if old is not None:
        if (later := _successor(work, old, new)) is not None:
            return Remembered(later, created=False)
        _require_replaceable(old, new)
    made = store.insert(work, new, namespace)
    if made is None:
        same = store.of_text(work, namespace, new.user, new.text)
        if same is None:
            raise Conflict("a memory with the same words has ended at this moment; remember this one again")
        if old is not None and same.id != old.id:
            raise Conflict(f"{shown(same.id)} says the same already; invalidate {shown(old.id)} instead")
        return Remembered(same, created=False)
    store.put_passage(work, made)
    store.note(work, made.id, MemoryEvent.REMEMBERED, author, note)
    if old is not None:
        _end(work, old, made.valid_from, author, note, by=made.id)
    return Remembered(made, created=True)


def get(database: Database, id_: str, namespace: str | None) -> Memory:
    """Return a memory. Raises NotFound."""
    with database.work() as work:
        return _require(work, id_, namespace)


def page(database: Database, of: MemoryFilter, after: str | None = None, limit: int = 100) -> MemoryPage:
    """Return memories, the newest first. Raises NotFound when there is no memory `after`."""
    with database.work() as work:
        last = None if after is None else _require(work, after, of.namespace).id
        found = store.page(work, of, last, limit + 1)
    return MemoryPage(found[:limit], len(found) > limit)


def history(database: Database, id_: str, namespace: str | None) -> MemoryHistory:
    """Return a memory with those that it superseded and that superseded it. Raises NotFound."""
    with database.work() as work:
        found = _require(work, id_, namespace)
        linked = store.chain(work, found.id, _LONGEST_CHAIN)
        memories = sorted(store.all_of(work, linked), key=lambda memory: (memory.valid_from, memory.id))
        return MemoryHistory(memories, store.history(work, linked))


def invalidate(
    database: Database, id_: str, namespace: str | None, author: str, *, at: datetime | None = None, note: str = ""
) -> Memory:
    """
    End a memory, now or at an instant. Its text stays, for reads as of an earlier instant.

    Raises NotFound, Conflict when it has ended before, and InvalidInput when it would end before it begins.
    """
    with database.work() as work:
        memory = _require(work, id_, namespace, lock=True)
        _require_past(work, "at", at)
        return _end(work, memory, at or store.now(work), _author(author), _note(note))


def supersede(
    database: Database, id_: str, new: NewMemory, namespace: str | None, author: str, *, note: str = ""
) -> Remembered:
    """
    Put a new memory of the same scope in the place of one, which ends where the new one begins.

    Raises NotFound, Conflict and InvalidInput.
    """
    with database.work() as work:
        old = _require(work, id_, namespace)
        return remember_in(work, new, old.namespace, author, supersedes=id_, note=note)


def mark(
    database: Database, id_: str, namespace: str | None, author: str, *, is_breakthrough: bool = True, note: str = ""
) -> Memory:
    """
    Mark a memory as a breakthrough, or give it back the kind that it had before.

    Raises NotFound, and Conflict for a memory that was written as a breakthrough and would have no other kind.
    """
    with database.work() as work:
        memory = _require(work, id_, namespace, lock=True)
        if (memory.kind == MemoryKind.BREAKTHROUGH) == is_breakthrough:
            return memory
        if is_breakthrough:
            kind, event = MemoryKind.BREAKTHROUGH, MemoryEvent.MARKED
        else:
            before = store.kind_before(work, memory.id)
            if before is None:
                raise Conflict(f"{id_} was remembered as a breakthrough; supersede it with a memory of another kind")
            kind, event = before, MemoryEvent.UNMARKED
        store.note(work, memory.id, event, _author(author), _note(note), memory.kind)
        store.set_kind(work, memory.id, kind)
        marked = _require(work, id_, namespace)
        if marked.invalid_at is None:
            store.put_passage(work, marked)
        return marked


def message_sources(database: Database, messages: Sequence[str], namespace: str) -> list[MemorySource]:
    """Return messages as sources. Raises InvalidInput for one that is not there, or of another namespace."""
    found = []
    with database.work() as work:
        for place, given in enumerate(messages[:MAX_SOURCES]):
            parsed = parsed_id(given, MESSAGE_PREFIX)
            message = None if parsed is None else conversation_store.find_message(work, parsed)
            of = None if message is None else conversation_store.find(work, message.conversation_id)
            if message is None or of is None or of.namespace != namespace:
                problem = Problem(f"messages[{place}]", f"no message {given[:100]!r}", "the id of a message: msg_…")
                raise InvalidInput([problem], "memory")
            found.append(MemorySource(MemoryOrigin.MESSAGE, message.role.value, message.conversation_id, message.id))
    return found


def require_conversation(database: Database, given: str, namespace: str) -> UUID:
    """Return the id of a conversation of a namespace. Raises NotFound."""
    parsed = parsed_id(given, CONVERSATION_PREFIX)
    with database.work() as work:
        found = None if parsed is None else conversation_store.find(work, parsed)
    if found is None or found.namespace != namespace:
        raise NotFound("conversation", texts.printable(given, 100), where="conversation")
    return found.id


def note_used_in(work: UnitOfWork, ids: Collection[str]) -> None:
    """Write that memories became part of a prompt. Ids of anything else are passed over."""
    store.used(work, {found for id_ in ids if (found := parsed_id(id_, PREFIX)) is not None})


def _require(work: UnitOfWork, id_: str, namespace: str | None, *, lock: bool = False) -> Memory:
    parsed = parsed_id(id_, PREFIX)
    found = None if parsed is None else store.find(work, parsed, lock=lock)
    if found is None or (namespace is not None and found.namespace != namespace):
        raise NotFound("memory", texts.printable(id_, 100))
    return found


def _require_past(work: UnitOfWork, field: str, at: datetime | None) -> None:
    """Raises InvalidInput: what will hold later would be recalled before."""
    if at is not None and at > store.now(work) + _SKEW:
        raise InvalidInput([Problem(field, f"{at:%FT%TZ} is in the future", "now, or an earlier instant")], "memory")


def _successor(work: UnitOfWork, old: Memory, new: NewMemory) -> Memory | None:
    """The memory that took the place of another one already, if it says the same as a new one."""
    later = None if old.superseded_by is None else store.find(work, old.superseded_by)
    return later if later is not None and text_hash(later.text) == text_hash(new.text) else None


def _require_replaceable(old: Memory, new: NewMemory) -> None:
    if old.invalid_at is not None:
        raise Conflict(f"{shown(old.id)} ended at {old.invalid_at:%Y-%m-%dT%H:%M:%SZ}, and cannot be superseded")
    if new.user != old.user:
        whose = "the whole namespace" if old.user is None else f"the user {old.user!r}"
        raise InvalidInput([Problem("user", "it is not that of the old memory", whose)], "memory")
    if new.valid_from is not None and new.valid_from < old.valid_from:
        raise InvalidInput(
            [Problem("valid_from", "the new memory would begin before the old one", f"after {old.valid_from:%FT%TZ}")],
            "memory",
        )


def _end(work: UnitOfWork, memory: Memory, at: datetime, author: str, note: str, by: UUID | None = None) -> Memory:
    if memory.invalid_at is not None:
        raise Conflict(f"{shown(memory.id)} ended at {memory.invalid_at:%Y-%m-%dT%H:%M:%SZ}")
    if at < memory.valid_from:
        raise InvalidInput(
            [Problem("at", "the memory would end before it begins", f"{memory.valid_from:%FT%TZ} or later")], "memory"
        )
    event = MemoryEvent.INVALIDATED if by is None else MemoryEvent.SUPERSEDED
    store.note(work, memory.id, event, author, note, "" if by is None else shown(by))
    store.remove_passages(work, [memory])
    ended = store.end(work, memory.id, at, by)
    assert ended is not None, "it is locked"
    return store.with_sources(work, [ended])[0]


def _author(author: str) -> str:
    return texts.storable(author, MAX_AUTHOR)


def _note(note: str) -> str:
    """Raises InvalidInput."""
    if len(note) > MAX_NOTE:
        raise InvalidInput([Problem("note", f"it has {len(note)} characters", f"at most {MAX_NOTE}")], "memory")
    return texts.storable(note)

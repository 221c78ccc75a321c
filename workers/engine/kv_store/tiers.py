"""
The tiers of a store: which prefix is in memory, which in a file, and which one leaves a tier next.

Entries come in the order of their last use, the least recently used first. A copy in memory whose file exists is
dropped first, because it can be read again. An entry that is being written or read is not dropped.
Entries without a file are written when they take more than half of the memory, so that those that are extended or
used again soon are never written.
A state that is larger than the memory passes through it: it is there only while it is written, or until it was
restored, in what parked texts leave of their memory.

Pure functions; nothing here copies a state or opens a file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from workers.engine.kv_store.state_file import StateData
from workers.engine.kv_store.state_folder import StateFile


@dataclass(slots=True)
class StoredPrefix:
    """A prefix of the store."""

    id: int
    #: Tokens, and the entries of images.
    tokens: tuple[int, ...]
    #: The highest position of its state in a cache.
    last: int
    #: Bytes of its state.
    size: int
    #: Its state in host memory; None when it is in a file only.
    data: StateData | None = None
    file: StateFile | None = None
    is_writing: bool = False
    #: When its reading began, by the clock of the store; None while it is not read.
    reading_since: float | None = None
    #: It could not be written, or is not worth a file: it stays in memory only.
    is_unwritten: bool = False
    #: Files of shorter prefixes, which its own file replaces.
    replaces: list[StateFile] = field(default_factory=list)

    @property
    def memory(self) -> int:
        """Bytes in host memory; those of a state that is being read count from the beginning."""
        return self.size if self.data is not None or self.reading_since is not None else 0

    @property
    def is_dirty(self) -> bool:
        """Whether it would be lost with its copy in memory, and can be written."""
        return self.data is not None and self.file is None and not self.is_unwritten


def make_room(entries: Iterable[StoredPrefix], size: int, memory: int, total: int) -> list[StoredPrefix] | None:
    """
    Return the entries whose copies are to go before `size` more bytes are in memory; None when that is not possible.

    Entries of at most `memory` bytes each have at most so many together, and with larger ones at most `total`.
    """
    held = [entry for entry in entries if entry.memory]
    first: list[StoredPrefix] | None = []
    if size <= memory:
        kept = [entry for entry in held if entry.size <= memory]
        first = choose_dropped(kept, sum(entry.memory for entry in kept) + size - memory)
    if first is None or size > total:
        return None
    gone = {entry.id for entry in first}
    left = [entry for entry in held if entry.id not in gone]
    second = choose_dropped(left, sum(entry.memory for entry in left) + size - total)
    return None if second is None else first + second


def choose_dropped(entries: Iterable[StoredPrefix], excess: int) -> list[StoredPrefix] | None:
    """Return the entries whose copies in memory are to go, to free `excess` bytes; None when that is not possible."""
    if excess <= 0:
        return []
    held = [entry for entry in entries if entry.data is not None and not entry.is_writing]
    chosen, freed = [], 0
    for entry in sorted(held, key=lambda entry: entry.file is None):  # stable: the order of use remains
        chosen.append(entry)
        freed += entry.size
        if freed >= excess:
            return chosen
    return None


def choose_written(entries: Iterable[StoredPrefix], limit: int) -> list[StoredPrefix]:
    """Return the entries to be written next, so that those without a file take at most `limit` bytes."""
    dirty = [entry for entry in entries if entry.is_dirty]
    left, chosen = sum(entry.size for entry in dirty), []
    for entry in dirty:
        if left <= limit:
            break
        left -= entry.size
        if not entry.is_writing:
            chosen.append(entry)
    return chosen

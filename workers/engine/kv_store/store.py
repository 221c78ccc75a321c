"""
The store of prefixes: what the KV cache evicts is kept in host memory, and from there in files.

A state is saved when its sequence is evicted, when the engine is idle, and when it ends; a later prompt that begins
with the same tokens gets it back without computing them. Tokens are compared one by one, never by a hash.
Entries of images are compared like tokens: they contain the digest of the pixels.
The bytes in memory and in files stay within their limits. Files are read and written by threads of the store; a request
whose prefix is being read waits for no longer than computing it would take.
Nothing that fails here fails a request: it is computed instead.

Only the engine's thread uses a store, except for `figures`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import structlog

from workers.engine.kv_store.figures import StoreFigures
from workers.engine.kv_store.file_thread import FileThread, StopCheck, Stopped
from workers.engine.kv_store.rates import MIN_TOKENS, Rates, SavingAllowance
from workers.engine.kv_store.state_file import StateData, StateRefused
from workers.engine.kv_store.state_folder import NoRoom, StateFile, StateFolder
from workers.engine.kv_store.tiers import StoredPrefix, choose_written, make_room
from workers.engine.prefix import Match, PrefixIndex

_LOG = structlog.get_logger(__name__)

#: Least seconds that a request waits for a file.
_MIN_WAIT = 0.1
#: Seconds that a closing store waits for a thread that is in a call of the system.
_CLOSE_SECONDS = 1.0
#: Seconds for which no file is written after one could not be, as the disk is full or the folder is gone; and none of a
#: state that is larger than the memory, after one of these found no room.
_PAUSE = 60.0
#: Seconds that a request waits for a file while the speed of prompts is not known.
_FIRST_WAIT = 1.0


@dataclass(frozen=True, slots=True)
class StoredMatch(Match):
    """A match in the cache, and a longer one in the store."""

    entry: StoredPrefix | None = None
    #: Tokens that the prompt has in common with the entry.
    stored_length: int = 0
    #: Its state; None while it is being read.
    data: StateData | None = None

    @property
    def cells(self) -> int:
        """Cells of the whole entry."""
        return 0 if self.entry is None else len(self.entry.tokens)

    @property
    def is_awaited(self) -> bool:
        """Whether the state is being read from its file."""
        return self.data is None


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """The limits of a store."""

    #: Most bytes in memory, and of states of parked texts and the store together.
    memory: int
    with_parked: int
    #: Most seconds for which saving may delay texts at once.
    save_seconds: float
    #: Tokens of the longest state that can be truncated; None means any. A longer one is used as a whole or not at all.
    longest_cut: int | None = None


class PrefixStore:
    """The store of one engine."""

    def __init__(self, limits: StoreLimits, folder: StateFolder | None = None) -> None:
        """Index the files of `folder`; None keeps states in memory only."""
        self._limits, self._folder = limits, folder
        self.rates = Rates()
        self._allowance = SavingAllowance(limits.save_seconds, perf_counter())
        self._index = PrefixIndex()
        #: The least recently used first.
        self._entries: dict[int, StoredPrefix] = {}
        self._next_id = 0
        self._parked = 0
        self._reader, self._writer = FileThread("kv-read"), FileThread("kv-write")
        #: When files are written again, and those of states that are larger than the memory, by perf_counter.
        self._writes_from = self._passes_from = 0.0
        self._counts: dict[str, float] = {}
        if folder is not None:
            self._index_files(folder)

    @property
    def writes_files(self) -> bool:
        """Whether states are written to files."""
        return self._folder is not None and perf_counter() >= self._writes_from

    @property
    def is_reading(self) -> bool:
        """Whether the state of a prefix is being read."""
        return any(entry.reading_since is not None for entry in self._entries.values())

    def on_read(self, wake: Callable[[], None]) -> None:
        """Set what is called, on another thread, when `poll` has something to do."""
        self._reader.wake = wake

    def poll(self) -> None:
        """Take what the threads have done."""
        self._reader.poll()
        self._writer.poll()

    def switch(self, identity: bytes) -> None:
        """Go on with states of another identity; those in memory are dropped."""
        self._index.clear()
        self._entries.clear()
        if self._folder is not None:
            self._folder = self._folder.accepting(identity)
            self._index_files(self._folder)

    # ---- restoring ------------------------------------------------------------------------------------------------

    def find(
        self, tokens: tuple[int, ...], live: Match, prefill_rate: float, cut: Callable[[int], int] = int
    ) -> StoredMatch | None:
        """
        Return the longest stored prefix of `tokens`, if restoring it is sooner than computing what `live` lacks.

        Begins to read its file if it is in no memory. `prefill_rate` is in tokens per second, 0 if it is not known.
        `cut` returns the length at which a prefix of a length may end, where it may not end everywhere.
        """
        found = self._index.find(tokens, self._usable)
        length = cut(found.length)
        if found.source is None or length < max(live.length, live.pending_length) + MIN_TOKENS:
            return None
        entry, gain = self._entries[found.source], length - live.length
        if length < len(entry.tokens) and not self._can_cut(entry):
            return None
        if not self.rates.is_worth(gain, entry.size, prefill_rate, from_file=entry.data is None):
            return None
        if entry.data is None and not self._is_read_in_time(entry, gain, prefill_rate):
            return None
        return StoredMatch(live.length, live.source, 0, None, entry, length, entry.data)

    def note_restored(self, match: StoredMatch, seconds: float, *, succeeded: bool) -> None:
        """Record that the state of a match was loaded into the cache, or that llama.cpp rejected it."""
        entry = match.entry
        assert entry is not None
        self._count("restore_seconds", seconds)
        if not succeeded:
            _LOG.warning("kv_state_rejected", tokens=len(entry.tokens), file=entry.file and entry.file.path.name)
            self._count("failed")
            self._remove(entry, with_file=True)
            return
        self.rates.note_restored(entry.size, seconds)
        self._count("restored")
        self._count("restored_tokens", match.stored_length)
        self._touch(entry)
        self._let_pass(entry)

    # ---- saving ---------------------------------------------------------------------------------------------------

    def keep(
        self,
        tokens: tuple[int, ...],
        size: Callable[[], int],
        save: Callable[[], StateData],
        *,
        last: int,
        prefill_rate: float,
        is_busy: bool,
    ) -> bool:
        """
        Save the state of a sequence that holds exactly `tokens`. Returns whether the store has it.

        `size` and `save` return the bytes of the state, and the state; `last` is its highest position. While texts are
        written (`is_busy`), a state is saved only if there is time for it. One that is larger than the memory is saved
        only if it can be written to a file.
        """
        self.poll()
        if len(tokens) < MIN_TOKENS:
            return False
        covering = self._index.find(tokens, self._usable)
        if covering.source is not None and covering.length == len(tokens):
            self._touch(self._entries[covering.source])
            return True
        bytes_ = size()
        now, passes = perf_counter(), bytes_ > self._limits.memory
        if (
            not self.rates.is_worth(len(tokens), bytes_, prefill_rate, from_file=passes)
            or (passes and not self._may_pass(bytes_))
            or (is_busy and not self._allowance.permits(bytes_ / self.rates.save, now))
            or not self._make_room(bytes_)
        ):
            self._count("not_stored")
            return False
        state = save()
        seconds = perf_counter() - now
        self._allowance.spend(seconds * is_busy)
        self.rates.note_saved(len(state), seconds)
        self._count("stored")
        self._count("save_seconds", seconds)
        entry = self._add(tokens, last, len(state), data=state)
        entry.is_unwritten = not self.rates.is_worth(len(tokens), len(state), prefill_rate, from_file=True)
        if passes:  # it replaces shorter prefixes when it is written, as it is lost when it cannot be
            entry.is_unwritten = False
            self._begin_write(entry)
        else:
            self._supersede(entry)
        self._write(self._memory_limit // 2)
        return True

    def holds(self, tokens: tuple[int, ...]) -> bool:
        """Whether a sequence of these tokens need not be saved."""
        if len(tokens) < MIN_TOKENS:
            return True
        return self._index.find(tokens, self._usable).length == len(tokens)

    def has_room(self, size: int) -> bool:
        """Whether a state of this size would drop nothing that would be lost."""
        self.poll()
        lost = sum(entry.size for entry in self._entries.values() if entry.memory and entry.file is None)
        if size > self._limits.memory:
            return self._may_pass(size) and lost + size <= self._total
        return lost + size <= self._memory_limit

    def write_all(self) -> None:
        """Begin to write all that has no file, what was used last first."""
        self._write(0)

    def wait_for_writes(self, until: float) -> None:
        """Wait until nothing is being written, at most until this time of perf_counter, and for no disk that hangs."""
        while any(entry.is_writing for entry in self._entries.values()) and (left := until - perf_counter()) > 0:
            if self._writer.is_stuck:
                return
            self._writer.wait(left)
            self.poll()

    def note_parked(self, size: int) -> None:
        """Leave room for the states of parked texts, which have this many bytes together."""
        self._parked = size
        self._make_room(0)

    def yield_room(self, size: int) -> None:
        """A text with a state of so many bytes is about to be parked (or, below 0, is no longer parked)."""
        self.note_parked(self._parked + size)

    def room_for_parked(self) -> int:
        """Return the bytes that can be freed for states of parked texts: all that is not being written or read."""
        held = [entry for entry in self._entries.values() if entry.is_writing or entry.reading_since is not None]
        return self._total - sum(entry.memory for entry in held)

    def close(self) -> None:
        """End the threads. What is being written is given up."""
        ended = [thread.close(_CLOSE_SECONDS) for thread in (self._reader, self._writer)]
        if self._folder is None:
            return
        if all(ended):
            self._folder.close()
        else:
            _LOG.warning("kv_disk_hangs", folder=str(self._folder.path))

    def figures(self) -> StoreFigures:
        """Return the figures. Safe from any thread."""
        entries = list(self._entries.values())
        counts: dict[str, Any] = dict(self._counts)
        return StoreFigures(
            **counts,
            entries=len(entries),
            memory_bytes=sum(entry.memory for entry in entries),
            disk_bytes=sum(entry.file.header.size for entry in entries if entry.file is not None),
        )

    # ---- entries --------------------------------------------------------------------------------------------------

    def _index_files(self, folder: StateFolder) -> None:
        try:
            files, refused = folder.index()
        except OSError as error:
            _LOG.warning("kv_folder_unusable", folder=str(folder.path), reason=str(error))
            return
        for file in reversed(files):
            self._add(file.header.tokens, file.header.last, file.header.state_bytes, file=file)
        self._count("refused", refused)
        _LOG.info("kv_files_indexed", folder=str(folder.path), files=len(files), refused=refused)

    def _add(
        self,
        tokens: tuple[int, ...],
        last: int,
        size: int,
        data: StateData | None = None,
        file: StateFile | None = None,
    ) -> StoredPrefix:
        entry = StoredPrefix(self._next_id, tokens, last, size, data, file)
        self._next_id += 1
        self._entries[entry.id] = entry
        self._index.insert(entry.id, tokens, len(tokens))
        return entry

    def _remove(self, entry: StoredPrefix, *, with_file: bool = False) -> None:
        """Remove the entry. The shorter prefixes whose files it has not replaced yet are there again."""
        was_there = self._entries.pop(entry.id, None) is not None
        self._index.remove(entry.id)
        entry.data = None
        replaces, entry.replaces = entry.replaces, []
        if was_there:
            for file in replaces:
                self._add(file.header.tokens, file.header.last, file.header.state_bytes, file=file)
        if with_file and entry.file is not None:
            self._remove_file(entry.file)

    def _touch(self, entry: StoredPrefix) -> None:
        if entry.id in self._entries:
            del self._entries[entry.id]
            self._entries[entry.id] = entry
        folder, file = self._folder, entry.file
        if folder is not None and file is not None and not self._writer.is_stuck:
            self._writer.submit(lambda _: folder.touch(file), lambda *_: None)

    def _supersede(self, entry: StoredPrefix) -> None:
        """Remove the longest shorter prefix of the entry: the entry can be truncated to it."""
        if not self._can_cut(entry):
            return
        for other in _prefixes(self._index, self._entries, entry):
            entry.replaces += other.replaces + ([] if other.file is None else [other.file])
            other.replaces = []
            self._remove(other)

    def _usable(self, id_: int, length: int) -> int:
        entry = self._entries[id_]
        return length if len(entry.tokens) == length or self._can_cut(entry) else 0

    def _can_cut(self, entry: StoredPrefix) -> bool:
        longest = self._limits.longest_cut
        return longest is None or len(entry.tokens) <= longest

    # ---- memory ---------------------------------------------------------------------------------------------------

    @property
    def _total(self) -> int:
        """Bytes that parked texts leave."""
        return self._limits.with_parked - self._parked

    @property
    def _memory_limit(self) -> int:
        return min(self._limits.memory, self._total)

    def _may_pass(self, size: int) -> bool:
        """Whether a state of this size, which is larger than the memory, can be written to a file."""
        if not self.writes_files or perf_counter() < self._passes_from:
            return False
        return self._folder is not None and size < self._folder.limit

    def _let_pass(self, entry: StoredPrefix) -> None:
        """Free the copy of a state that is larger than the memory, and has its file."""
        if entry.size > self._limits.memory and entry.file is not None and not entry.is_writing:
            entry.data = None

    def _make_room(self, size: int) -> bool:
        """Drop copies in memory until `size` more bytes fit. Returns False when they do not."""
        dropped = make_room(self._entries.values(), size, self._limits.memory, self._total)
        if dropped is None:
            return False
        for entry in dropped:
            entry.data = None
            if entry.file is None:
                self._remove(entry)
        return True

    # ---- files ----------------------------------------------------------------------------------------------------

    def _is_read_in_time(self, entry: StoredPrefix, gain: int, prefill_rate: float) -> bool:
        """Begin to read the file of the entry, or look whether that takes too long already."""
        now, folder, file = perf_counter(), self._folder, entry.file
        if entry.reading_since is not None:
            longest = gain / prefill_rate if prefill_rate else _FIRST_WAIT
            return now - entry.reading_since < max(_MIN_WAIT, longest)
        if folder is None or file is None or not self._make_room(entry.size):
            return False
        entry.reading_since = now

        def read(check: StopCheck) -> StateData:
            return folder.read(file, check)

        self._reader.submit(read, lambda outcome, seconds: self._note_read(entry, outcome, seconds))
        return True

    def _note_read(self, entry: StoredPrefix, outcome: Any, seconds: float) -> None:
        entry.reading_since = None
        self._count("read_seconds", seconds)
        file, folder = entry.file, self._folder
        assert file is not None
        assert folder is not None
        if isinstance(outcome, BaseException):
            self._remove(entry)
            if isinstance(outcome, StateRefused):
                self._count("refused")
                folder.note_refused(file.path, outcome)
            elif not isinstance(outcome, Stopped):
                self._count("failed")
                _LOG.warning("kv_file_not_read", file=file.path.name, reason=str(outcome))
            return
        self._count("files_read")
        self._count("bytes_read", len(outcome))
        self.rates.note_read(len(outcome), seconds)
        if entry.id in self._entries:
            entry.data = outcome

    def _write(self, limit: int) -> None:
        """Begin to write entries until those without a file have at most `limit` bytes."""
        if not self.writes_files:
            return
        for entry in reversed(choose_written(self._entries.values(), limit)):
            self._begin_write(entry)

    def _begin_write(self, entry: StoredPrefix) -> None:
        if (folder := self._folder) is not None:
            entry.is_writing = True
            self._writer.submit(_writing(folder, entry), self._note_written_of(entry))

    def _note_written_of(self, entry: StoredPrefix) -> Callable[[Any, float], None]:
        def note(outcome: Any, seconds: float) -> None:
            entry.is_writing = False
            self._count("write_seconds", seconds)
            if isinstance(outcome, BaseException):
                entry.is_unwritten = True
                if entry.size > self._limits.memory:
                    self._remove(entry)
                    self._passes_from = perf_counter() + _PAUSE  # it would be copied again at once
                if not isinstance(outcome, Stopped):
                    if not isinstance(outcome, NoRoom):
                        self._writes_from = perf_counter() + _PAUSE
                    self._count("failed")
                    _LOG.warning("kv_file_not_written", reason=f"{type(outcome).__name__}: {outcome}")
                return
            self._count("files_written")
            self._count("bytes_written", outcome.header.size)
            if entry.id not in self._entries:  # a longer prefix has replaced it meanwhile
                self._remove_file(outcome)
                return
            entry.file = outcome
            if entry.size > self._limits.memory:
                self._supersede(entry)
            while entry.replaces:
                self._remove_file(entry.replaces.pop())
            self._let_pass(entry)

        return note

    def _remove_file(self, file: StateFile) -> None:
        if (folder := self._folder) is not None:
            self._writer.submit(lambda _: folder.remove(file), lambda *_: None)

    def _count(self, name: str, amount: float = 1) -> None:
        self._counts[name] = self._counts.get(name, 0) + amount


def _writing(folder: StateFolder, entry: StoredPrefix) -> Callable[[StopCheck], StateFile]:
    tokens, last, state = entry.tokens, entry.last, entry.data
    assert state is not None
    return lambda check: folder.write(tokens, last, state, check)


def _prefixes(index: PrefixIndex, entries: dict[int, StoredPrefix], entry: StoredPrefix) -> Iterator[StoredPrefix]:
    """Yield the other entries that are whole prefixes of the entry, the longest first."""

    def whole(id_: int, length: int) -> int:
        return length if id_ != entry.id and len(entries[id_].tokens) == length else 0

    while (found := index.find(entry.tokens, whole)).source is not None and found.length:
        yield entries[found.source]

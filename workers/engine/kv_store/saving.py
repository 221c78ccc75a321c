"""
Saving while the engine is idle, and when it ends: what makes prefixes survive the end of their process.

When an engine that writes files has been idle for a moment, its kept sequences are saved one by one, the one used last
first, so that a killed process loses little. When it is closed, the same is done within a limited time; the texts that
were running come first, those with most progress before others, because they are retried.
All methods but `figures` and `on_read` belong to the engine's thread. Without a store they do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import structlog

from workers.engine.kv_store.figures import NO_STORE, StoreFigures
from workers.engine.kv_store.store import PrefixStore

_LOG = structlog.get_logger(__name__)

#: Seconds without work after which an engine saves.
_IDLE_SECONDS = 2.0
#: Seconds for saving and writing when the engine ends; its agent kills it after ten.
_CLOSE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class EndedText:
    """A text that was running or parked when the engine ended."""

    #: Tokens computed plus tokens written.
    progress: int
    #: Return the bytes of its state, and save it.
    size: Callable[[], int]
    save: Callable[[], object]


class Saveable(Protocol):
    """The kept sequences of a context."""

    def save_one(self) -> bool:
        """Save one of them; False when there is none to be saved, or no room."""


class Parked(Protocol):
    """The parked tasks."""

    def parked(self) -> tuple[int, int]:
        """Return their number, and the bytes of their states."""


class IdleSaving:
    """The saving of one engine."""

    def __init__(self, store: PrefixStore | None) -> None:
        self.store = store
        self._idle_since: float | None = None
        self._is_done = False
        #: The texts that were running at the end, in the order in which they are saved.
        self.ended: Sequence[EndedText] = ()

    def on_read(self, wake: Callable[[], None]) -> None:
        """Set what is called when a state was read from a file."""
        if self.store is not None:
            self.store.on_read(wake)

    @property
    def is_reading(self) -> bool:
        """Whether a state is being read from a file."""
        return self.store is not None and self.store.is_reading

    def figures(self) -> StoreFigures:
        """Return the figures of the store. Safe from any thread."""
        return NO_STORE if self.store is None else self.store.figures()

    def poll(self) -> None:
        """Take what was read and written. There is work, so the engine is not idle."""
        self._idle_since, self._is_done = None, False
        if self.store is not None:
            self.store.poll()

    def note_parked(self, tasks: Parked) -> None:
        """Leave room for the states of parked tasks."""
        if self.store is not None:
            self.store.note_parked(tasks.parked()[1])

    def step(self, slots: Saveable) -> float | None:
        """The engine is idle: save a sequence if it is time. Returns the seconds until the next step; None for none."""
        store, now = self.store, perf_counter()
        if store is None or not store.writes_files or self._is_done:
            return None
        if self._idle_since is None:
            self._idle_since = now
        if (left := self._idle_since + _IDLE_SECONDS - now) > 0:
            return left
        store.poll()
        if not slots.save_one():
            store.write_all()
            self._is_done = True
            return None
        return 0.001

    def close(self, slots: Saveable | None) -> None:
        """Save and write what there is time for, and close the store. Without `slots` nothing is saved."""
        store = self.store
        if store is None:
            return
        began = perf_counter()
        until = began + _CLOSE_SECONDS
        self._save_ended(store, until)
        while store.writes_files and perf_counter() < until:
            saved = slots is not None and slots.save_one()
            store.write_all()
            store.wait_for_writes(until)
            if not saved:
                break
        store.close()
        if store.figures().files_written:
            _LOG.info("kv_store_closed", seconds=round(perf_counter() - began, 3))

    def _save_ended(self, store: PrefixStore, until: float) -> None:
        """Save the texts that were running, and write each to its file before the next is saved."""
        ended, self.ended = self.ended, ()
        for text in ended:
            if not store.writes_files or perf_counter() >= until:
                return
            if not store.has_room(text.size()):
                store.write_all()
                store.wait_for_writes(until)
            text.save()
            store.write_all()
            store.wait_for_writes(until)

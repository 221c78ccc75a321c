"""
The keyring: which caller a key belongs to, without a query per request.

What the database says about a key is kept for `MAX_AGE`, after which a revocation is seen at the latest; where it was
revoked through the same process, at once. A key that is in use is read again before that, while requests go on.
That a key was used is written at most once a minute, and no request waits for it. A flood of unknown keys displaces no
known one, and delays its look-up by that of `_MAX_LOOK_UPS` others at most.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from app.access import key_store, keys
from app.access.callers import OPERATOR, Caller, NotAuthenticated
from app.access.keys import StoredSecrets
from app.api import threads
from app.kernel import log
from app.kernel.database import Database
from app.kernel.errors import ArrieroError, Unavailable

_log = log.get(__name__)

#: Seconds for which a key is valid without another look at the database.
MAX_AGE = 5.0
#: Seconds after which a key that is used is read again in the background.
_REFRESH_AGE = 2.0
#: Most known and most unknown keys that are kept; and most that are looked up at a time, besides known ones.
_MAX_KEPT, _MAX_LOOK_UPS = 10_000, 100


@dataclass(slots=True)
class _Entry:
    """What the database said about an id."""

    stored: StoredSecrets | None
    #: When it was asked, on the monotonic clock.
    asked_at: float
    #: Secrets whose use is written or being written: the current one (False), the previous one (True).
    marked: set[bool] = field(default_factory=set)


class Keyring:
    """The API keys of one process. Its methods are called on its event loop, `forget` on any thread."""

    def __init__(
        self, database: Database, operator_key: str | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        """`operator_key` may do everything, without a row in the database. `now` is a monotonic clock, in seconds."""
        self._database, self._now = database, now
        self._operator = None if operator_key is None else keys.hash_of(operator_key)
        #: By id, the oldest first.
        self._known: dict[str, _Entry] = {}
        self._unknown: dict[str, _Entry] = {}
        #: How often a key was forgotten: what was read before that is not kept.
        self._forgotten = 0
        self._look_ups: dict[str, asyncio.Task[_Entry]] = {}
        self._background: set[asyncio.Task[None]] = set()

    async def caller_of(self, key: str) -> Caller:
        """
        Return the caller with this key.

        Raises NotAuthenticated for a key that does not exist, or is revoked, expired or rotated away. Raises
        Unavailable when the database does not answer.
        """
        key_id = keys.id_of(key)
        if key_id is None:
            raise NotAuthenticated(f"{keys.UNKNOWN}: it does not have the form of one", has_key=True)
        return await self.caller_of_hash(key_id, keys.hash_of(key))

    async def caller_of_hash(self, key_id: str, given: bytes) -> Caller:
        """Return the caller with the key of this id and hash. Raises like `caller_of`."""
        if self._operator is not None and hmac.compare_digest(given, self._operator):
            return OPERATOR
        entry = await self._entry(key_id)
        verdict = keys.verify(given, entry.stored, self._now() - entry.asked_at)
        if verdict.refusal is not None or entry.stored is None:
            raise NotAuthenticated(verdict.refusal or keys.UNKNOWN, has_key=True)
        self._note_use(key_id, entry, verdict.is_previous)
        return entry.stored.caller

    def forget(self, key_id: str) -> None:
        """Ask the database about a key at its next use: it was changed."""
        self._forgotten += 1
        self._known.pop(key_id, None)
        self._unknown.pop(key_id, None)
        # What is being read may be older than the change: requests from now on do not wait for it.
        self._look_ups.pop(key_id, None)

    async def close(self) -> None:
        """Wait for what is being written."""
        await asyncio.gather(*self._look_ups.values(), *self._background, return_exceptions=True)

    async def _entry(self, key_id: str) -> _Entry:
        entry = self._known.get(key_id) or self._unknown.get(key_id)
        age = MAX_AGE if entry is None else self._now() - entry.asked_at
        if entry is not None and age < MAX_AGE:
            if age >= _REFRESH_AGE and key_id not in self._look_ups:
                self._start(self._refresh(key_id))
            return entry
        return await self._look_up(key_id)

    async def _look_up(self, key_id: str) -> _Entry:
        """Ask the database; requests with the same key share the answer."""
        task = self._look_ups.get(key_id)
        if task is None:
            if len(self._look_ups) >= _MAX_LOOK_UPS and key_id not in self._known:
                raise Unavailable("too many API keys are being looked up; send this request again")
            task = self._look_ups[key_id] = asyncio.create_task(self._read(key_id))
            task.add_done_callback(partial(self._end_look_up, key_id))
        return await asyncio.shield(task)

    def _end_look_up(self, key_id: str, task: asyncio.Task[_Entry]) -> None:
        if self._look_ups.get(key_id) is task:
            del self._look_ups[key_id]

    async def _read(self, key_id: str) -> _Entry:
        entry, forgotten = _Entry(None, self._now()), self._forgotten
        entry.stored = await threads.run_for_keys(self._find, key_id)
        if self._forgotten == forgotten:
            self._known.pop(key_id, None)
            self._unknown.pop(key_id, None)
            kept = self._unknown if entry.stored is None else self._known
            while len(kept) >= _MAX_KEPT:
                kept.pop(next(iter(kept)), None)
            kept[key_id] = entry
        return entry

    def _find(self, key_id: str) -> StoredSecrets | None:
        with self._database.work() as work:
            return key_store.find_secrets(work, key_id)

    async def _refresh(self, key_id: str) -> None:
        try:
            await self._look_up(key_id)
        except ArrieroError as error:
            _log.warning("key_refresh_failed", key_id=key_id, error=str(error))

    def _note_use(self, key_id: str, entry: _Entry, is_previous: bool) -> None:
        assert entry.stored is not None
        written = entry.stored.previous_used_ago if is_previous else entry.stored.used_ago
        if is_previous not in entry.marked and (written is None or written >= key_store.USE_INTERVAL):
            entry.marked.add(is_previous)
            self._start(self._mark_used(key_id, is_previous=is_previous))

    async def _mark_used(self, key_id: str, *, is_previous: bool) -> None:
        try:
            await threads.run_for_keys(self._write_use, key_id, is_previous=is_previous)
        except ArrieroError as error:
            _log.warning("key_use_not_written", key_id=key_id, error=str(error))

    def _write_use(self, key_id: str, *, is_previous: bool) -> None:
        with self._database.work() as work:
            key_store.mark_used(work, key_id, is_previous=is_previous)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

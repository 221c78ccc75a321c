"""Which runs of waiting calls have ended: one query each second for all calls of this process."""

from __future__ import annotations

import asyncio
import time
from uuid import UUID

from app.api import threads
from app.kernel.database import Database
from app.workflows.runs import views

#: Seconds for which an answer is valid.
_VALID = 1.0
#: Seconds after the last question about a run for which it is read with the others.
_WATCHED = 5.0


class EndedRuns:
    """What is known of the runs of waiting calls."""

    def __init__(self, database: Database) -> None:
        """Does not connect."""
        self._database = database
        self._ended: frozenset[UUID] = frozenset()
        #: By run, when it was last read, and the time until which it is read.
        self._read: dict[UUID, float] = {}
        self._watched: dict[UUID, float] = {}
        self._lock = asyncio.Lock()

    async def has(self, run_id: UUID) -> bool:
        """Whether a run has ended, as it was about a second ago or later. Raises DatabaseUnreachable."""
        self._watched[run_id] = time.monotonic() + _WATCHED
        async with self._lock:
            if time.monotonic() > self._read.get(run_id, 0.0) + _VALID:
                now = time.monotonic()
                self._watched = {one: until for one, until in self._watched.items() if until > now}
                asked = list(self._watched)
                self._ended = await threads.run_for_stream(views.ended, self._database, asked)
                self._read = dict.fromkeys(asked, now)
        return run_id in self._ended

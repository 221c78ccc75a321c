"""The estimates of waiting calls: one read of the queues each second, for all calls of this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from uuid import UUID

from app.api import threads
from app.catalog.model import Model
from app.inference import queues, waiting
from app.inference.waiting import ModelQueue, WaitEstimate
from app.kernel import log
from app.kernel.database import Database
from app.kernel.errors import ArrieroError

_log = log.get(__name__)

#: Seconds for which a read is valid.
_VALID = 1.0
#: Seconds after the last question about a model for which its queue is read with the others.
_WATCHED = 5.0


class WaitEstimates:
    """What is known of the queues of the models that calls wait for."""

    def __init__(self, database: Database) -> None:
        """Does not connect."""
        self._database = database
        self._queues: Mapping[str, ModelQueue] = {}
        self._read_at = 0.0
        #: By name, a model and the time until which its queue is read.
        self._watched: dict[str, tuple[Model, float]] = {}
        self._lock = asyncio.Lock()

    async def of(self, model: Model, run_id: UUID | None) -> WaitEstimate:
        """The wait of a run that waits for the model; of a new call without one. At most about a second old."""
        self._watched[model.name] = (model, time.monotonic() + _WATCHED)
        async with self._lock:
            if time.monotonic() > self._read_at + _VALID or model.name not in self._queues:
                await self._read()
        return waiting.estimate(
            self._queues.get(model.name, ModelQueue(model.name)), None if run_id is None else str(run_id)
        )

    async def _read(self) -> None:
        now = time.monotonic()
        self._watched = {name: one for name, one in self._watched.items() if one[1] > now}
        models = [model for model, _ in self._watched.values()]
        try:
            self._queues = await threads.run_for_stream(queues.read, self._database, models)
        except ArrieroError as error:
            _log.warning("queues_not_read", error=str(error))
            self._queues = {}
        self._read_at = time.monotonic()

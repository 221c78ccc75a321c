"""
What a pool is about, and how far its load is, for all who ask: its heart, the exporter, the log.

Any thread may ask. Progress is logged now and then, so that a log tells a slow load from one that stands still.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from app.fleet.pool import PoolPhase
from app.kernel import log

_log = log.get(__name__)

#: Seconds between two lines about a load.
_PAUSE = 2.0


class Status:
    """The phase of one pool."""

    def __init__(self, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._model, self._clock = model, clock
        self._noted = clock()
        self.phase = PoolPhase.STARTING
        #: Part of the model that is loaded, 0 to 1.
        self.loaded = 0.0
        #: Why it refused or failed; empty otherwise.
        self.detail = ""
        #: Called when the phase is another.
        self.on_change: Callable[[], None] = lambda: None

    def note_progress(self, loaded: float) -> None:
        """So much of the model is loaded; called on the thread that loads."""
        self.loaded = loaded
        now = self._clock()
        if now - self._noted >= _PAUSE and loaded < 1:
            self._noted = now
            _log.info("model_loading", model=self._model, percent=round(100 * loaded))

    def enter(self, phase: PoolPhase, detail: str = "") -> None:
        """The next phase began."""
        self.phase, self.detail = phase, detail or self.detail
        _log.info("pool_phase", phase=phase, model=self._model)
        self.on_change()

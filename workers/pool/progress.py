"""
The status of a pool, its phase and the progress of its load, for its heartbeat, the exporter and the log.

Any thread may read it. Progress is logged every two seconds, so that the log distinguishes a slow load from a stalled
one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from app.fleet.pool import PoolPhase
from app.kernel import log

_log = log.get(__name__)

#: Seconds between two log lines about a load.
_PAUSE = 2.0


class Status:
    """The status of one pool."""

    def __init__(self, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._model, self._clock = model, clock
        self._logged_at = clock()
        self.phase = PoolPhase.STARTING
        #: The loaded part of the model, 0 to 1.
        self.loaded = 0.0
        #: Why it refused or failed, or why its server does not serve; empty otherwise.
        self.detail = ""
        #: Called when the phase has changed.
        self.on_change: Callable[[], None] = lambda: None

    def note_progress(self, loaded: float) -> None:
        """Note the loaded part of the model, 0 to 1; called on the loading thread."""
        self.loaded = loaded
        now = self._clock()
        if now - self._logged_at >= _PAUSE and loaded < 1:
            self._logged_at = now
            _log.info("model_loading", model=self._model, percent=round(100 * loaded))

    def note_problem(self, problem: str) -> None:
        """Note why a pool that serves cannot answer now, because its server does not; empty when it can."""
        self.detail = problem
        self.on_change()

    def enter(self, phase: PoolPhase, detail: str = "") -> None:
        """Enter a phase; `detail` says why it refused or failed."""
        self.phase, self.detail = phase, detail or self.detail
        _log.info("pool_phase", phase=phase, model=self._model)
        self.on_change()

"""
The stage of a pool: loading its model, serving, draining, unloading; and how far the load is.

Any thread may ask. Progress is logged now and then, so that a log tells a slow load from one that stands still.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum

from app.kernel import log

_log = log.get(__name__)

#: Seconds between two lines about a load.
_PAUSE = 2.0


class Stage(StrEnum):
    """What a pool is about."""

    LOADING = "loading"
    SERVING = "serving"
    #: It takes no more steps, and finishes or hands back those that it has.
    DRAINING = "draining"
    UNLOADING = "unloading"


class Status:
    """The stage of one pool. It only goes forward."""

    def __init__(self, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._model, self._clock = model, clock
        self._told = clock()
        self.stage = Stage.LOADING
        #: Part of the model that is loaded, 0 to 1.
        self.loaded = 0.0

    def note_progress(self, loaded: float) -> None:
        """So much of the model is loaded; called on the thread that loads."""
        self.loaded = loaded
        now = self._clock()
        if now - self._told >= _PAUSE and loaded < 1:
            self._told = now
            _log.info("model_loading", model=self._model, percent=round(100 * loaded))

    def enter(self, stage: Stage) -> None:
        """The next stage began."""
        self.stage = stage
        _log.info("pool_stage", stage=stage, model=self._model)

"""The job of batches. One process never runs it twice at the same time, and one process at a time works on a batch."""

from __future__ import annotations

from app.inference.batches.advance import Batches
from app.inference.batches.tasks import BATCHES
from app.kernel import log
from app.kernel.errors import Unavailable
from workers.passes import exclusive, in_turn
from workers.runtime import Runtime

_log = log.get(__name__)


def run_batches(runtime: Runtime) -> None:
    """Advance all batches: see `app.inference.batches.advance`."""
    with in_turn(), exclusive(BATCHES) as acquired:
        if not acquired:
            return
        settings = runtime.settings
        batches = Batches(runtime.runs, lambda: runtime.catalog, settings.files, settings.batches, runtime.owner)
        try:
            if batches.advance_all():
                runtime.activity.note()
        except Unavailable as error:
            _log.warning("batches_postponed", error=str(error))

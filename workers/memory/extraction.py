"""The job of memories: it starts extractions and writes what they found. One process never runs it twice at a time."""

from __future__ import annotations

import threading

from app.kernel import log
from app.kernel.errors import Unavailable
from app.memory.memories.extraction import Extraction
from workers.runtime import Runtime

_log = log.get(__name__)

_RUNNING = threading.Lock()


def run_extraction(runtime: Runtime) -> None:
    """Advance the extraction of all conversations: see `app.memory.memories.extraction`."""
    if not _RUNNING.acquire(blocking=False):
        return
    try:
        if Extraction(runtime.runs, lambda: runtime.catalog, runtime.settings.memories).advance_all():
            runtime.activity.note()
    except Unavailable as error:
        _log.warning("extraction_postponed", error=str(error))
    finally:
        _RUNNING.release()

"""The job of memories: it starts extractions and writes what they found. One process never runs it twice at a time."""

from __future__ import annotations

from app.kernel import log
from app.kernel.errors import Unavailable
from app.memory.memories.extraction import Extraction
from app.memory.memories.tasks import EXTRACTION
from workers.passes import exclusive, in_turn
from workers.runtime import Runtime

_log = log.get(__name__)


def run_extraction(runtime: Runtime) -> None:
    """Advance the extraction of all conversations: see `app.memory.memories.extraction`."""
    with in_turn(), exclusive(EXTRACTION) as acquired:
        if not acquired:
            return
        try:
            if Extraction(runtime.runs, runtime.settings.memories).advance_all():
                runtime.activity.note()
        except Unavailable as error:
            _log.warning("extraction_postponed", error=str(error))

"""The job of memories: it starts extractions and writes what they found."""

from __future__ import annotations

from collections.abc import Mapping

from app.memory.memories.extraction import Extraction
from workers.passes import in_turn
from workers.runtime import Runtime


def run_extraction(runtime: Runtime) -> Mapping[str, object] | None:
    """Advance the extraction of all conversations: see `app.memory.memories.extraction`."""
    with in_turn():
        advanced = Extraction(runtime.runs, runtime.settings.memories, runtime.recall).advance_all()
    if not advanced:
        return None
    runtime.activity.note()
    return {"extractions": advanced}

"""The job of batches. One process never runs it twice at the same time, and one process at a time works on a batch."""

from __future__ import annotations

from collections.abc import Mapping

from app.inference.batches.advance import Batches
from app.inference.batches.tasks import BATCHES
from workers.passes import exclusive, in_turn
from workers.runtime import Runtime


def run_batches(runtime: Runtime) -> Mapping[str, object] | None:
    """Advance all batches: see `app.inference.batches.advance`."""
    with in_turn(), exclusive(BATCHES) as acquired:
        if not acquired:
            return None
        settings = runtime.settings
        batches = Batches(runtime.runs, lambda: runtime.catalog, settings.files, settings.batches, runtime.owner)
        advanced = batches.advance_all()
    if not advanced:
        return None
    runtime.activity.note()
    return {"batches": advanced}

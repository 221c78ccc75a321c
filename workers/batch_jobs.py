"""The job of batches. One process at a time works on a batch."""

from __future__ import annotations

from collections.abc import Mapping

from app.inference.batches.advance import Batches
from workers.passes import in_turn
from workers.runtime import Runtime


def run_batches(runtime: Runtime) -> Mapping[str, object] | None:
    """Advance all batches: see `app.inference.batches.advance`."""
    with in_turn():
        settings = runtime.settings
        batches = Batches(runtime.runs, lambda: runtime.catalog, settings.files, settings.batches, runtime.owner)
        advanced = batches.advance_all()
    if not advanced:
        return None
    runtime.activity.note()
    return {"batches": advanced}

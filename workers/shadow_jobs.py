"""The job of shadows: candidates do again what has ended, and pairs are compared."""

from __future__ import annotations

from collections.abc import Mapping

from app.inference.shadows.service import Shadows
from workers.passes import in_turn
from workers.runtime import Runtime


def run_shadows(runtime: Runtime) -> Mapping[str, object] | None:
    """Begin runs of candidates, and compare pairs: see `app.inference.shadows.service`. Raises Unavailable."""
    with in_turn():
        done = Shadows(runtime.runs, lambda: runtime.catalog).advance()
    if not (done.begun or done.compared or done.skipped):
        return None
    runtime.activity.note()
    return {"begun": done.begun, "compared": done.compared, "skipped": done.skipped}

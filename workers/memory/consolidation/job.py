"""The job of consolidations. One process at a time does it, under an advisory lock: nothing is clustered twice."""

from __future__ import annotations

from collections.abc import Mapping

from app.memory.consolidation.advance import Consolidations
from workers.memory.consolidation import clusterer
from workers.passes import alone
from workers.runtime import Runtime

_LOCK = 7_205_759_403_824


def run_consolidation(runtime: Runtime) -> Mapping[str, object] | None:
    """Do one pass: see `app.memory.consolidation.advance`. Clustering may take long, so it waits for no other job."""
    with alone(runtime.runs.database, _LOCK) as acquired:
        advanced = acquired and consolidations(runtime).advance_all()
    if not advanced:
        return None
    runtime.activity.note()
    return {"advanced": True}


def consolidations(runtime: Runtime) -> Consolidations:
    """Return the consolidations with the dependencies of a process."""
    wanted = runtime.settings.recall.embedding_model
    entry = runtime.catalog.resolve(wanted) if wanted else None
    name = wanted if entry is None else entry.name
    return Consolidations(runtime.runs, runtime.settings.consolidation, name, clusterer.cluster)

"""The job of consolidations. One process at a time does it, under an advisory lock: nothing is clustered twice."""

from __future__ import annotations

from sqlalchemy import text

from app.kernel import log
from app.kernel.errors import Unavailable
from app.memory.consolidation.advance import Consolidations
from app.memory.consolidation.tasks import CONSOLIDATION
from workers.memory.consolidation import clusterer
from workers.passes import exclusive
from workers.runtime import Runtime

_log = log.get(__name__)

_LOCK = 7_205_759_403_824
_TRY_LOCK, _UNLOCK = text(f"SELECT pg_try_advisory_lock({_LOCK})"), text(f"SELECT pg_advisory_unlock({_LOCK})")


def run_consolidation(runtime: Runtime) -> None:
    """Do one pass: see `app.memory.consolidation.advance`. Clustering may take long, so it waits for no other job."""
    with exclusive(CONSOLIDATION) as acquired:
        if not acquired:
            return
        try:
            with runtime.runs.database.session() as connection:
                if not connection.execute(_TRY_LOCK).scalar_one():
                    return
                try:
                    if consolidations(runtime).advance_all():
                        runtime.activity.note()
                finally:
                    connection.execute(_UNLOCK)
        except Unavailable as error:
            _log.warning("consolidation_postponed", error=str(error))


def consolidations(runtime: Runtime) -> Consolidations:
    """Return the consolidations with the dependencies of a process."""
    wanted = runtime.settings.recall.embedding_model
    entry = runtime.catalog.resolve(wanted) if wanted else None
    name = wanted if entry is None else entry.name
    return Consolidations(runtime.runs, runtime.settings.consolidation, name, clusterer.cluster)

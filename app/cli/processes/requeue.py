"""
Requeue: expires the leases of a dead worker, so that its steps are requeued immediately.

`python -m app.cli.processes.requeue INCARNATION` runs as a program of its own: the process tree must not wait for the
database, and has no connection to it and no threads, so that it can be forked. If the database is unavailable for
longer than a lease, the leases expire by themselves.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence

from app.kernel import addresses, log, settings
from app.kernel.database import Database
from app.kernel.errors import DatabaseUnreachable
from app.workflows.runs.recovery import owners

#: Seconds between two attempts while the database is unavailable.
_PAUSE = 1.0

_log = log.get(__name__)


def main(arguments: Sequence[str]) -> int:
    """Expire the leases of the incarnation. Returns the exit code: 0 when that was done."""
    (incarnation,) = arguments
    loaded = settings.load().settings
    log.configure(loaded.log)
    database = Database(addresses.of(loaded).database_url, pool_size=1)
    limit, pause = time.monotonic() + loaded.runs.lease.total_seconds(), threading.Event()
    try:
        while time.monotonic() < limit:
            try:
                steps = owners.expire_leases(database, incarnation)
            except DatabaseUnreachable:
                pause.wait(_PAUSE)
                continue
            if steps:
                _log.warning("leases_of_dead_worker_expired", incarnation=incarnation, steps=steps)
            return 0
        return 1
    finally:
        database.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

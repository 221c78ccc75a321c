"""The job of probes: every pool that serves writes a token now and then."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from app.governance.probes.service import Probes
from app.kernel import addresses, broker, clock
from app.scheduler import wake_up
from app.scheduler.operator_commands import OperatorCommands
from workers.runtime import Runtime


def run_probes(runtime: Runtime) -> Mapping[str, object] | None:
    """Probe the pools that are due, and have those restarted that do not work. See `app.governance.probes`."""
    return _probed(runtime, every_pool=False)


def run_all_probes(runtime: Runtime) -> Mapping[str, object] | None:
    """Probe every pool that serves, as an operator has requested it."""
    return _probed(runtime, every_pool=True)


def _probed(runtime: Runtime, *, every_pool: bool) -> Mapping[str, object] | None:
    database = runtime.runs.database
    client = broker.connect(addresses.of(runtime.settings).redis_url)
    try:
        commands = OperatorCommands(database, partial(wake_up.wake_reconciler, runtime.runs.publisher))
        probes = Probes(database, client, commands, runtime.settings.probes, runtime.settings.fleet.progress_timeout)
        return probes.run(runtime.catalog, clock.now, every_pool=every_pool) or None
    finally:
        client.close()

"""
The model files of a host: which models of the catalogue can be served here, and why others cannot.

A file that is damaged or hostile, or that crashes its reader, is marked unusable with the reason until it is replaced;
the other models are not affected. The layouts of models on the host's devices are declared when their files are new,
and again from time to time. When a file is replaced, the failures of pools that loaded the earlier one no longer count.

Every pass of the agent looks at the files; what has not changed is not read again.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime

from app.catalog import files
from app.catalog.catalog import CatalogSource
from app.catalog.model import Model
from app.catalog.serving import servability
from app.devices.device import Inventory
from app.fleet import backoff, hosts
from app.fleet.hosts import Hosts
from app.footprint.layout import KnownLayout
from app.kernel import clock, log
from app.kernel.database import Database
from app.kernel.errors import Conflict, DatabaseUnreachable, LeaseLost, ModelFileMissing, ModelFileUnusable
from app.kernel.loop_guard import LoopGuard
from app.kernel.settings import Settings
from app.scheduler import needs
from workers.agent import inventory, state_files

_log = log.get(__name__)

#: Least seconds between two checks of the files, and the least ratio of this time to that of a check: a large catalogue
#: is checked less often.
_PAUSE, _RATIO = 1.0, 50.0
#: Seconds between two declarations of all layouts: margins shrink again after memory ran out.
_DECLARE = 3600.0


class ModelFiles:
    """The model files of this host."""

    def __init__(self, settings: Settings, catalogs: CatalogSource, database: Database, fleet_hosts: Hosts) -> None:
        """Do not read any file yet."""
        self._settings, self._catalogs, self._database, self._hosts = settings, catalogs, database, fleet_hosts
        #: By model, the configuration of each model whose file is usable.
        self._usable: dict[str, str] = {}
        #: By model, the configuration whose simulated layouts were declared last: rules may change its slots.
        self._simulated: dict[str, str] = {}
        #: By model, why its file is unusable.
        self._unusable: dict[str, str] = {}
        #: By model, the version of its file that was last seen usable.
        self._versions: dict[str, object] = {}
        #: The models whose stored states were kept when those of others were removed.
        self._stored_of: frozenset[str] | None = None
        self._next_check = self._declared_at = float("-inf")
        self._guard = LoopGuard(DatabaseUnreachable, LeaseLost, Conflict)

    @property
    def configurations(self) -> list[str]:
        """The configurations of the models that can be served here."""
        return list(self._usable.values())

    @property
    def problems(self) -> list[str]:
        """Sentences for people: which files cannot be served, and why."""
        return [hosts.not_served(name, reason) for name, reason in sorted(self._unusable.items())]

    def invalidate(self) -> None:
        """Make the next `refresh` check all files again."""
        self._usable, self._next_check = {}, float("-inf")

    def refresh(self, measured: Inventory) -> None:
        """Check the files, if the last check is old enough, and declare the layouts of models whose files are new."""
        now = time.monotonic()
        if now < self._next_check:
            return
        declare_all = now - self._declared_at > _DECLARE
        if declare_all:
            self._declared_at = now
        catalog = self._catalogs.current()
        if self._stored_of != (slugs := frozenset(model.slug for model in catalog)):
            state_files.remove_unknown(self._settings.data_dir, slugs)
            self._stored_of = slugs
        for name in {*self._usable, *self._unusable, *self._simulated} - set(catalog.names):
            self._forget(name)
            self._simulated.pop(name, None)
        for model in catalog:
            with self._guard.item("model", model.name) as failed:
                configuration = needs.configuration_id(model)
                is_new = declare_all or self._simulated.get(model.name) != configuration
                known = list(inventory.simulated_layouts(model, measured)) if is_new else []
                known += self._check(model, measured, again=declare_all)
                self._hosts.declare_layouts(known)
                self._simulated[model.name] = configuration
            if failed:
                self._mark_unusable(model, f"its file cannot be read: {type(failed[0]).__name__}: {failed[0]}")
        end = time.monotonic()
        self._next_check = end + max(_PAUSE, (end - now) * _RATIO)

    def _check(self, model: Model, measured: Inventory, *, again: bool) -> list[KnownLayout]:
        """Check the file of a model. Returns the layouts of the model, if the file is new, or `again` is set."""
        known: list[KnownLayout] = []
        if model.remote is not None:
            return self._check_server(model, measured, again=again)
        try:
            path = files.check(model, self._settings.data_dir)
            version = files.file_version(path)
            replaced = self._versions.get(model.name) != version
            configuration = needs.configuration_id(model)
            if again or replaced or self._usable.get(model.name) != configuration:
                known += inventory.layouts(
                    model, self._settings, measured, self._database, self._settings.fleet.host_here
                )
        except ModelFileMissing:
            self._forget(model.name)
        except ModelFileUnusable as error:
            self._mark_unusable(model, str(error))
        else:
            if replaced:
                self._forget_failures(model, files.changed_at(path))
            self._versions[model.name] = version
            self._usable[model.name] = configuration
            self._unusable.pop(model.name, None)
        return known

    def _check_server(self, model: Model, measured: Inventory, *, again: bool) -> list[KnownLayout]:
        """Check that the server of a model may be called from here; as `_check` otherwise."""
        configuration = needs.configuration_id(model)
        is_new = again or self._usable.get(model.name) != configuration
        try:
            servability.check(model, self._settings)
            servability.require_secret(model, self._settings)
        except ModelFileUnusable as error:
            self._mark_unusable(model, str(error))
            return []
        self._usable[model.name] = configuration
        self._unusable.pop(model.name, None)
        return list(inventory.remote_layouts(model, measured)) if is_new else []

    def _forget(self, name: str) -> None:
        self._usable.pop(name, None)
        self._unusable.pop(name, None)

    def _forget_failures(self, model: Model, seconds: float) -> None:
        """Pools that failed before the file became what it is now are no reason not to start one."""
        now = clock.now()
        changed_at = min(datetime.fromtimestamp(seconds, UTC), now)
        if now - changed_at < 2 * backoff.QUARANTINE:
            self._hosts.forget_failures(model.name, changed_at)

    def _mark_unusable(self, model: Model, reason: str) -> None:
        self._usable.pop(model.name, None)
        if self._unusable.get(model.name) != reason:
            self._unusable[model.name] = reason
            _log.warning("model_unusable", model=model.name, error=reason)

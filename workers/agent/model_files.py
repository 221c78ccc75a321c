"""
The model files of a host: which models of the catalogue can be served here, and why others cannot.

A file that is damaged or hostile, or breaks its reader, is set aside with the reason, until it is another one; it hides
none of the others. What models need on the devices of the host is declared when their files are new, and from time to
time again.
"""

from __future__ import annotations

import time

from app.catalog import files
from app.catalog.catalog import Catalog
from app.catalog.model import Model
from app.devices.device import Inventory
from app.fleet import hosts
from app.fleet.hosts import Hosts
from app.footprint.layout import KnownLayout
from app.kernel import log
from app.kernel.database import Database
from app.kernel.errors import Conflict, DatabaseUnreachable, LeaseLost, ModelFileMissing, ModelFileUnusable
from app.kernel.loop_guard import LoopGuard
from app.kernel.settings import Settings
from app.scheduler import needs
from workers.agent import inventory

_log = log.get(__name__)

#: Seconds in which the files of models are looked for again.
_FILES = 15.0
#: Seconds in which it is told again what models need: it may be less than when memory ran out.
_DECLARED = 3600.0


class ModelFiles:
    """The model files of this host."""

    def __init__(self, settings: Settings, catalog: Catalog, database: Database, written_to: Hosts) -> None:
        """Looks at nothing yet."""
        self._settings, self._catalog, self._database, self._hosts = settings, catalog, database, written_to
        #: By model, the configurations whose files are here.
        self._here: dict[str, str] = {}
        #: By model, what is wrong with its file.
        self._wrong: dict[str, str] = {}
        self._looked_at = self._declared_at = float("-inf")
        self._guard = LoopGuard(DatabaseUnreachable, LeaseLost, Conflict)

    @property
    def configurations(self) -> list[str]:
        """Those whose files are here."""
        return list(self._here.values())

    @property
    def problems(self) -> list[str]:
        """Which files cannot be served, and why, in sentences for people."""
        return [hosts.not_served(name, reason) for name, reason in sorted(self._wrong.items())]

    def forget(self) -> None:
        """Look at all of them again the next time."""
        self._here, self._looked_at = {}, float("-inf")

    def look(self, inventory_: Inventory) -> None:
        """Find out which models are here, and what those that are new need on this host's devices."""
        now = time.monotonic()
        if now - self._looked_at < _FILES:
            return
        self._looked_at = now
        all_of_them = now - self._declared_at > _DECLARED
        if all_of_them:
            self._declared_at = now
        for model in self._catalog:
            with self._guard.item("model", model.name) as failed:
                known = list(inventory.stand_in(model, inventory_)) if all_of_them else []
                known += self._look_for(model, inventory_, again=all_of_them)
                self._hosts.declare_layouts(known)
            if failed:
                self._quarantine(model, f"its file cannot be read: {type(failed[0]).__name__}: {failed[0]}")

    def _look_for(self, model: Model, inventory_: Inventory, *, again: bool) -> list[KnownLayout]:
        """What the model needs here, if its file is here, and that is not known yet or wanted `again`."""
        known: list[KnownLayout] = []
        try:
            files.check(model, self._settings.data_dir)
            if again or model.name not in self._here:
                known += inventory.layouts(
                    model, self._settings, inventory_, self._database, self._settings.fleet.host_here
                )
        except ModelFileMissing:
            self._here.pop(model.name, None)
            self._wrong.pop(model.name, None)
        except ModelFileUnusable as error:
            self._quarantine(model, str(error))
        else:
            self._here[model.name] = needs.configuration_id(model)
            self._wrong.pop(model.name, None)
        return known

    def _quarantine(self, model: Model, reason: str) -> None:
        self._here.pop(model.name, None)
        if self._wrong.get(model.name) != reason:
            self._wrong[model.name] = reason
            _log.warning("model_unusable", model=model.name, error=reason)

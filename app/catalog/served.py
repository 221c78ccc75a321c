"""
The served catalogue: a catalogue that may change, under overrides that may change (`serving/overrides.py`).

Its objects are compared by identity: it is the same one until something has changed.
"""

from __future__ import annotations

import threading

from app.catalog.catalog import Catalog, CatalogSource
from app.catalog.live import LiveCatalog
from app.catalog.serving.overrides import overridden
from app.kernel.sections.governance import ServingSettings
from app.kernel.settings import Settings


class ServedCatalog:
    """A catalogue that may change, under overrides that may change. Safe for threads."""

    def __init__(self, source: CatalogSource, serving: ServingSettings | None = None) -> None:
        self._source, self._serving = source, serving or ServingSettings()
        self._lock = threading.Lock()
        self._made: tuple[Catalog, ServingSettings, Catalog] | None = None

    def follow(self, settings: Settings) -> None:
        """Serve with the overrides of these settings from now on."""
        self.apply(settings.serving)

    def apply(self, serving: ServingSettings) -> None:
        """Serve with other overrides from now on."""
        self._serving = serving

    def current(self) -> Catalog:
        """Returns the catalogue of this moment: the same object until something has changed."""
        source, serving = self._source.current(), self._serving
        with self._lock:
            if self._made is None or self._made[0] is not source or self._made[1] != serving:
                self._made = (source, serving, overridden(source, serving))
            return self._made[2]


def live_catalog(settings: Settings) -> ServedCatalog:
    """Returns the catalogues that the settings name, under their overrides. Raises InvalidCatalog."""
    return ServedCatalog(LiveCatalog(settings), settings.serving)

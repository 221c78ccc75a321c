"""
Overrides: the catalogue as it is served at this moment, with what rules and operators have changed for a while.

A model with other slots is another configuration: its pools are replaced. A paused model is not served, and a diverted
one is tried after the models that its requests go to. An override of a model that the catalogue does not have, or that
its entry does not allow, is left out.
"""

from __future__ import annotations

import threading
from dataclasses import replace

from app.catalog import catalog as catalogs
from app.catalog.catalog import Catalog, CatalogSource
from app.catalog.model import Model
from app.kernel.errors import InvalidInput
from app.kernel.sections.governance import ServingSettings


class ServedCatalog:
    """A catalogue that may change, under overrides that may change. Safe for threads."""

    def __init__(self, source: CatalogSource, serving: ServingSettings | None = None) -> None:
        self._source, self._serving = source, serving or ServingSettings()
        self._lock = threading.Lock()
        self._made: tuple[Catalog, ServingSettings, Catalog] | None = None

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


def overridden(catalog: Catalog, serving: ServingSettings) -> Catalog:
    """Returns the catalogue with the overrides; itself without any."""
    if not (serving.paused or serving.diverted or serving.slots):
        return catalog
    slots = {name: int(number) for name, _, number in (entry.rpartition("=") for entry in serving.slots)}
    models = tuple(_with_slots(model, slots.get(model.name)) for model in catalog)
    diverted = {}
    for entry in serving.diverted:
        name, _, others = entry.rpartition("=")
        known = tuple(other for other in others.split("+") if catalog.find(other) is not None and other != name)
        if catalog.find(name) is not None and known:
            diverted[name] = known
    paused = frozenset(name for name in serving.paused if catalog.find(name) is not None)
    return replace(catalog, models=models, paused=paused, diverted=diverted)


def _with_slots(model: Model, slots: int | None) -> Model:
    if slots is None or slots == model.slots:
        return model
    try:
        return catalogs.with_values(model, {"slots": slots}, {})
    except InvalidInput:
        return model

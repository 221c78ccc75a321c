"""
Overrides: the catalogue as it is served at this moment, with what rules and operators have changed for a while.

A model with other slots is another configuration: its pools are replaced. A paused model is not served, and a diverted
one is tried after the models that its requests go to. An override of a model that the catalogue does not have, or that
its entry does not allow, is left out.
"""

from __future__ import annotations

from dataclasses import replace

from app.catalog import catalog as catalogs
from app.catalog.catalog import Catalog
from app.catalog.model import Model
from app.kernel.errors import InvalidInput
from app.kernel.sections.governance import ServingSettings


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

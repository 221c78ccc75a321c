"""
Needs: what the planner is told of a model, from its entry in the catalogue and from what agents and pools found out.

The id of a configuration follows from all that decides what a pool loads: an entry that changes gets another one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta

from app.catalog.model import Model
from app.footprint.layout import KnownLayout
from app.scheduler.cluster import Configuration, Layout, Packing, Reserve

#: The type of the host's RAM, and that of devices that are not there.
CPU, SIMULATED = "cpu", "simulated"
#: Keys of an entry that change nothing of what is loaded.
_TOLD = {"name", "description", "licence", "use_cases", "pools", "simulated"}
#: From the start of a process until it begins to load.
_BEGIN = timedelta(seconds=2)
#: What a stand-in without numbers of its own takes beside the model's file: a part of it, and bytes for the caches.
_BESIDE, _CACHES = 0.1, 512 * 2**20


@dataclass(frozen=True, slots=True)
class OperatorTarget:
    """What an operator, or the settings, want of a model."""

    #: Pools that are kept up.
    pools: int = 0
    pinned: bool = False
    #: Pools that are wanted once.
    ordered: int = 0


def configuration_id(model: Model) -> str:
    """The same for entries that load the same."""
    loaded = json.dumps(model.model_dump(mode="json", exclude=_TOLD), sort_keys=True)
    return f"{model.slug}.{hashlib.sha256(loaded.encode()).hexdigest()[:8]}"


def configuration_of(
    model: Model, known: Iterable[KnownLayout], hosts: Mapping[str, timedelta], wish: OperatorTarget = OperatorTarget()
) -> Configuration:
    """
    What the planner is told. `hosts` are those that have the file, or will have it after that long.

    A model that some host has is never laid on a stand-in: whoever asks for it would get texts that it did not write.
    """
    pools = model.pools
    known = list(known)
    real = [one for one in known if one.type != SIMULATED]
    layouts = [
        Layout(one.type, one.parts, one.load, one.tokens_per_second, one.ram)
        for one in sorted(real or known, key=lambda one: (one.type == CPU, len(one.parts), one.type))
    ]
    reserve = None
    if pools.reserve is not None:
        count = max(pools.reserve.devices, -(-pools.reserve.slots // model.slots))
        reserve = Reserve(count, pools.reserve.within)
    least = max(pools.min, wish.pools)
    return Configuration(
        id=configuration_id(model),
        model=model.name,
        slots=model.slots,
        layouts=tuple(layouts),
        files=hosts,
        fetch=None,
        keep_alive=None if isinstance(pools.keep_alive, str) else pools.keep_alive,
        min_pools=least,
        max_pools=max(pools.max, least),
        ordered=wish.ordered,
        reserve=reserve,
        pinned=pools.pinned or wish.pinned,
        only=frozenset(pools.only),
        anti_affinity=frozenset(pools.anti_affinity),
        packing=Packing(pools.packing),
    )


def simulated(model: Model, bandwidth: int) -> KnownLayout | None:
    """What a stand-in takes on a simulated device; None when neither the entry nor the size of its file says so."""
    size = _simulated_bytes(model)
    if size is None:
        return None
    load, pace = _BEGIN + simulated_load(model, bandwidth), float(model.simulated.tokens_per_second)
    return KnownLayout(configuration_id(model), SIMULATED, (size,), "catalogue", load, pace)


def simulated_load(model: Model, bandwidth: int) -> timedelta:
    """How long a stand-in pretends to load."""
    if model.simulated.load is not None:
        return model.simulated.load
    return timedelta(seconds=(sum(model.source.size) or _simulated_bytes(model) or 0) / bandwidth)


def _simulated_bytes(model: Model) -> int | None:
    file = sum(model.source.size)
    return model.simulated.bytes or (round(file * (1 + _BESIDE)) + _CACHES if file else None)

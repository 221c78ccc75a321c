"""
Needs: the planner's configuration of a model, from its entry in the catalogue and from what agents and pools measured.

The id of a configuration follows from everything that decides what a pool loads: an entry that changes gets another id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType

from app.catalog.model import Model
from app.footprint.layout import KnownLayout
from app.scheduler.planner.cluster import CPU, SIMULATED, Configuration, Packing, Reserve

#: Keys of an entry that do not change what is loaded.
_NOT_LOADED = {
    *("name", "description", "licence", "use_cases", "pools", "simulated"),
    *("aliases", "rating", "fallback"),
}
#: Time from the start of a process until it begins to load.
_BEGIN = timedelta(seconds=2)
#: Bytes that a simulated pool uses in addition to the model's file where its entry has no number: a part of the file,
#: and caches.
_ADDED_PART, _CACHES = 0.1, 512 * 2**20

#: RAM that a pool without a model in it reserves for its process, and the time until it serves.
SERVER_POOL_BYTES, _SERVER_POOL_LOAD = 192 * 2**20, timedelta(seconds=2)
#: Tokens a second of a server, until attempts have shown better.
_SERVER_PACE = 50.0


@dataclass(frozen=True, slots=True)
class OperatorTarget:
    """The pools of a model that operators, or the settings, ask for."""

    #: Pools that are kept running.
    pools: int = 0
    pinned: bool = False
    #: Pools that are to be started once.
    requested: int = 0


def configuration_id(model: Model) -> str:
    """The id of a configuration: the same for entries that load the same."""
    loaded = json.dumps(model.model_dump(mode="json", exclude=_NOT_LOADED), sort_keys=True)
    return f"{model.slug}.{hashlib.sha256(loaded.encode()).hexdigest()[:8]}"


def configuration_of(
    model: Model,
    known: Iterable[KnownLayout],
    hosts: Mapping[str, timedelta],
    target: OperatorTarget = OperatorTarget(),
    unusable: Mapping[str, str] = MappingProxyType({}),
) -> Configuration:
    """
    The configuration of a model. `hosts` are those that have its file, or will have it after that time; `unusable` says
    by host why the file there cannot be used.

    A model whose file some host has is never placed on a simulated device: clients would get text that the model did
    not write.
    """
    pools = model.pools
    known = list(known)
    real = [one for one in known if one.type != SIMULATED]
    layouts = sorted(real or known, key=lambda one: (one.type == CPU, len(one.parts), one.type))
    reserve = None
    if pools.reserve is not None:
        count = max(pools.reserve.devices, -(-pools.reserve.slots // model.slots))
        reserve = Reserve(count, pools.reserve.within)
    least = max(pools.min, target.pools)
    most = max(pools.max, least)
    if model.remote is not None:
        # One pool holds the limits of the server: its slots and its rates.
        least, most = min(least, 1), 1
    return Configuration(
        id=configuration_id(model),
        model=model.name,
        slots=model.slots,
        layouts=tuple(layouts),
        files=hosts,
        fetch=None,
        installation=model.source.installation(model.name),
        unusable=unusable,
        keep_alive=None if isinstance(pools.keep_alive, str) else pools.keep_alive,
        min_pools=least,
        max_pools=most,
        requested=target.requested,
        reserve=reserve,
        pinned=pools.pinned or target.pinned,
        only=frozenset(pools.only),
        anti_affinity=frozenset(pools.anti_affinity),
        packing=Packing(pools.packing),
    )


def simulated(model: Model, bandwidth: int) -> KnownLayout | None:
    """The layout of a model on a simulated device; None when neither its entry nor the size of its file gives bytes."""
    size = _simulated_bytes(model)
    if size is None:
        return None
    load, pace = _BEGIN + simulated_load(model, bandwidth), float(model.simulated.tokens_per_second)
    return KnownLayout(configuration_id(model), SIMULATED, (size,), "catalogue", load, pace)


def of_server(model: Model) -> KnownLayout:
    """The layout of a model that a server serves: a process in the RAM of a host, and no other device."""
    pace = _SERVER_PACE
    return KnownLayout(configuration_id(model), CPU, (SERVER_POOL_BYTES,), "server", _SERVER_POOL_LOAD, pace)


def simulated_load(model: Model, bandwidth: int) -> timedelta:
    """The time that a simulated pool pretends to load."""
    if model.simulated.load is not None:
        return model.simulated.load
    return timedelta(seconds=(sum(model.source.size) or _simulated_bytes(model) or 0) / bandwidth)


def _simulated_bytes(model: Model) -> int | None:
    file = sum(model.source.size)
    return model.simulated.bytes or (round(file * (1 + _ADDED_PART)) + _CACHES if file else None)

"""
Isolation: a plan for all the others when a configuration cannot be planned for.

A layout or a count that no planner expects is a defect of one configuration: it must not stop the fleet.
The configurations that break the plan are found one by one, and are left without layouts and without demand.

Nothing here reads a clock or a database.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from app.scheduler.planner.cluster import Cluster, Configuration, Demand

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Isolated(Generic[T]):
    """A result, and what it was made without."""

    result: T
    #: By id of a configuration, what planning for it raised.
    broken: Mapping[str, Exception]


def isolated(fleet: Cluster, demand: Sequence[Demand], make: Callable[[Cluster, Sequence[Demand]], T]) -> Isolated[T]:
    """
    What `make` gives for the fleet and the demand, without the configurations that break it.

    Raises what `make` raises when no configuration alone is to blame.
    """
    try:
        return Isolated(make(fleet, demand), {})
    except Exception as error:
        broken = _broken(fleet, demand, make)
        if not broken:
            raise
        others = {configuration.id for configuration in fleet.configurations} - broken.keys()
        try:
            return Isolated(make(*_only(fleet, demand, others)), broken)
        except Exception:  # noqa: BLE001 the first one says more
            raise error from None


def _broken(
    fleet: Cluster, demand: Sequence[Demand], make: Callable[[Cluster, Sequence[Demand]], T]
) -> dict[str, Exception]:
    found: dict[str, Exception] = {}
    for configuration in fleet.configurations:
        try:
            make(*_only(fleet, demand, {configuration.id}))
        except Exception as error:  # noqa: BLE001 as above
            found[configuration.id] = error
    return found


def _only(fleet: Cluster, demand: Sequence[Demand], ids: Collection[str]) -> tuple[Cluster, list[Demand]]:
    """The fleet and the demand as if nothing were asked of the other configurations, and nothing known of them."""
    configurations = tuple(one if one.id in ids else _asleep(one) for one in fleet.configurations)
    usage = {id_: usage for id_, usage in fleet.usage.items() if id_ in ids}
    reserves = tuple(one for one in fleet.reserves if one.configuration in ids)
    alone = replace(fleet, configurations=configurations, usage=usage, reserves=reserves)
    return alone, [one for one in demand if one.configuration in ids]


def _asleep(configuration: Configuration) -> Configuration:
    return replace(configuration, layouts=(), reserve=None)

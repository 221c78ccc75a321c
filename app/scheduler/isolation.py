"""
Isolation: a plan for all other models when one model cannot be planned for.

A layout or a count that the planner does not expect is a defect of one configuration: it must not stop the fleet.
The configurations that break the plan are found one by one. The plan is then made without their layouts and without
demand for them.

Nothing here reads a clock or a database.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from app.scheduler.planner.cluster import Cluster, Configuration
from app.scheduler.planner.demand import WaitingSteps

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Isolated(Generic[T]):
    """A result, and the configurations that it was made without."""

    result: T
    #: By id of a configuration, the error that planning for it raised.
    broken: Mapping[str, Exception]


def isolated(
    cluster: Cluster, waiting: Sequence[WaitingSteps], make: Callable[[Cluster, Sequence[WaitingSteps]], T]
) -> Isolated[T]:
    """
    The result of `make` for the cluster and the waiting steps, without the configurations that break it.

    Raises what `make` raises when no single configuration is the cause.
    """
    try:
        return Isolated(make(cluster, waiting), {})
    except Exception as error:
        broken = _broken(cluster, waiting, make)
        if not broken:
            raise
        others = {configuration.id for configuration in cluster.configurations} - broken.keys()
        try:
            return Isolated(make(*_only(cluster, waiting, others)), broken)
        except Exception:  # noqa: BLE001 the first error says more
            raise error from None


def _broken(
    cluster: Cluster, waiting: Sequence[WaitingSteps], make: Callable[[Cluster, Sequence[WaitingSteps]], T]
) -> dict[str, Exception]:
    found: dict[str, Exception] = {}
    for configuration in cluster.configurations:
        try:
            make(*_only(cluster, waiting, {configuration.id}))
        except Exception as error:  # noqa: BLE001 as above
            found[configuration.id] = error
    return found


def _only(
    cluster: Cluster, waiting: Sequence[WaitingSteps], ids: Collection[str]
) -> tuple[Cluster, list[WaitingSteps]]:
    """The cluster and the waiting steps, with nothing known of the other configurations and no demand for them."""
    models = {one.model for one in cluster.configurations if one.id in ids}
    alone = replace(
        cluster,
        configurations=tuple(one if one.id in ids else _without_layouts(one) for one in cluster.configurations),
        rates={model: rates for model, rates in cluster.rates.items() if model in models},
        arrivals={model: pattern for model, pattern in cluster.arrivals.items() if model in models},
        reserves=tuple(one for one in cluster.reserves if one.configuration in ids),
    )
    return alone, [group for group in waiting if group.model in models]


def _without_layouts(configuration: Configuration) -> Configuration:
    return replace(configuration, layouts=(), reserve=None)

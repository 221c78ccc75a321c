"""
Pressure: how long the steps of each configuration have waited, in weighted seconds.

A second of waiting counts the weight of the step's class, and less the more its namespace has had beyond its share.
A configuration is due at the last moment at which a start still meets the target of a class, and must be served when a
step has waited beyond the bound of its class, or has a deadline that leaves no more than the time to load.
Steps of a namespace whose allowance is used up press nothing.

Nothing here reads a clock: the caller passes `now`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from app.scheduler.planner.cluster import Account, Configuration, Demand
from app.scheduler.planner.policy import PlacementPolicy

#: Seconds before the last moment at which a start meets the target, and after it.
_BEFORE, _AFTER = 1.0, 1.0
#: A rank beyond that of every class.
NO_RANK = 99


@dataclass(slots=True)
class ConfigurationDemand:
    """All that waits, or soon will, for one configuration. Times are seconds."""

    configuration: Configuration
    #: From a grant until it serves, in its first layout, on a free device.
    load: float
    #: What its steps have waited, weighted, and by how much that grows in a second.
    pressure: float = 0.0
    growth: float = 0.0
    #: Weights of steps that cannot begin yet, discounted, and until the first of them is ready.
    ahead: float = 0.0
    soon: float = math.inf
    #: Steps that wait now, and how long they will keep a slot in all.
    steps: int = 0
    work: float = 0.0
    #: Rank of the most urgent class among them.
    rank: int = NO_RANK
    #: How long the oldest has waited.
    oldest: float = 0.0
    due: bool = False
    must: bool = False
    #: Until a step will have waited beyond its bound.
    bound: float = math.inf
    #: What each namespace presses, weighted as above.
    namespaces: dict[str, float] = field(default_factory=dict)
    #: Namespaces with an allowance that is used up, and steps of theirs that wait.
    exhausted: dict[str, int] = field(default_factory=dict)


def nothing(configuration: Configuration) -> ConfigurationDemand:
    """Nobody waits for it."""
    return ConfigurationDemand(configuration, load_of(configuration))


def load_of(configuration: Configuration) -> float:
    """Seconds of a start in its first layout; 0 where none is known."""
    return configuration.layouts[0].load.total_seconds() if configuration.layouts else 0.0


def fairness(accounts: Mapping[str, Account], asking: Iterable[str]) -> dict[str, float]:
    """
    What a second of waiting counts for each namespace that asks: 1 at its share, up to 2 below it, towards 0 beyond.

    Shares are of attained service by weight, as in Tiresias (NSDI 2019) and Themis (NSDI 2020).
    """
    known = {name: accounts.get(name, Account()) for name in asking}
    attained = sum(account.attained_seconds for account in known.values())
    weights = sum(account.weight for account in known.values())
    if attained <= 0 or len(known) < 2:
        return dict.fromkeys(known, 1.0)
    return {
        name: 2 / (1 + account.attained_seconds * weights / (attained * account.weight))
        for name, account in known.items()
    }


def wants(
    configurations: Mapping[str, Configuration],
    accounts: Mapping[str, Account],
    demand: Iterable[Demand],
    now: datetime,
    policy: PlacementPolicy,
) -> dict[str, ConfigurationDemand]:
    """What is wanted of each configuration that is asked for, by its id. Demand for what is not known is left out."""
    demand = list(demand)
    fair = fairness(accounts, {one.namespace for one in demand})
    exhausted = {
        name for name, account in accounts.items() if account.exhausted_until and account.exhausted_until > now
    }
    classes = {
        priority: (priority.rank, policy.weights[priority], policy.target[priority], policy.bound[priority])
        for priority in policy.weights
    }
    found: dict[str, ConfigurationDemand] = {}
    for one in demand:
        want = found.get(one.configuration)
        if want is None:
            configuration = configurations.get(one.configuration)
            if configuration is None:
                continue
            want = found[one.configuration] = nothing(configuration)
        namespace, steps = one.namespace, one.steps
        if namespace in exhausted:
            want.exhausted[namespace] = want.exhausted.get(namespace, 0) + steps
            continue
        rank, weight, target, bound = classes[one.priority]
        growth = weight * fair[namespace] * steps
        if one.ready is not None:
            want.ahead += policy.look_ahead * growth
            want.soon = min(want.soon, max((one.ready - now).total_seconds(), 0.0))
            continue
        oldest = max((now - one.oldest).total_seconds(), 0.0)
        mean = oldest if one.mean is None else max((now - one.mean).total_seconds(), 0.0)
        want.pressure += growth * mean
        want.growth += growth
        want.steps += steps
        want.work += steps * one.work.total_seconds()
        if rank < want.rank:
            want.rank = rank
        if oldest > want.oldest:
            want.oldest = oldest
        last = target - want.load - policy.unload
        if last - _BEFORE <= oldest <= last + _AFTER:
            want.due = True
        want.bound = min(want.bound, max(bound - oldest, 0.0))
        if oldest >= bound or (
            one.deadline is not None and (one.deadline - now).total_seconds() <= want.load + policy.unload
        ):
            want.must = True
        # A second on top, so that steps that came this instant name their namespace too.
        want.namespaces[namespace] = want.namespaces.get(namespace, 0.0) + growth * (mean + 1.0)
    return found

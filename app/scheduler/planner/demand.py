"""
The pressure of demand: how much the steps that wait for a model weigh in the plan.

Pressure is waiting time in weighted seconds: each second counts the weight of the step's class times the fairness of
its namespace, which falls when the namespace is above its share.
The demand is due when a start that begins now just meets the target of a class. It is overdue when a step has waited
beyond the bound of its class, or has a deadline that leaves no more than the time to load.
Steps of a namespace whose allowance of device seconds is used up exert no pressure.

Nothing here reads a clock: the caller passes `now`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from app.kernel.priority import Priority
from app.scheduler.planner.cluster import Account, Configuration
from app.scheduler.planner.policy import PlacementPolicy

#: Seconds around the last moment at which a start meets the target, in which the demand is due.
_BEFORE, _AFTER = 1.0, 1.0
#: A rank beyond that of every class.
NO_RANK = 99


@dataclass(frozen=True, slots=True)
class WaitingSteps:
    """Steps of one model, class and namespace that wait for the model, or will soon."""

    #: Name of the model.
    model: str
    priority: Priority
    #: How many steps, and since when the oldest waits.
    steps: int
    oldest: datetime
    #: Mean of the instants since which they wait; None: as the oldest.
    mean: datetime | None = None
    namespace: str = ""
    #: When the most urgent of them must have begun.
    deadline: datetime | None = None
    #: Expected time that one step keeps a slot.
    work: timedelta = timedelta(seconds=5)
    #: For steps that still wait for other steps: when they are expected to be ready. None: they are ready.
    ready: datetime | None = None


@dataclass(slots=True)
class ModelDemand:
    """The demand for one model, over all classes and namespaces. Times are seconds."""

    configuration: Configuration
    #: From a grant until a pool serves, in the first layout, on a free device.
    load: float
    #: Weighted waiting time of the steps so far, and its increase each second.
    pressure: float = 0.0
    growth: float = 0.0
    #: Discounted weights of steps that are not ready yet, and the time until the first of them is.
    upcoming: float = 0.0
    upcoming_in: float = math.inf
    #: Steps that wait now, and the time that they will keep a slot in all.
    steps: int = 0
    work: float = 0.0
    #: Rank of the most urgent class among them.
    rank: int = NO_RANK
    #: Waiting time of the oldest.
    oldest: float = 0.0
    due: bool = False
    overdue: bool = False
    #: Time until a step will have waited beyond its bound.
    until_bound: float = math.inf
    #: Time until the last moment at which a start meets the first deadline, if its victims are idle; less than 0 after.
    until_deadline: float = math.inf
    #: Pressure by namespace, with one second added to each step's waiting time, so that new steps count too.
    namespaces: dict[str, float] = field(default_factory=dict)
    #: Waiting steps of namespaces whose allowance is used up, by namespace.
    exhausted: dict[str, int] = field(default_factory=dict)

    def for_replica(self, policy: PlacementPolicy) -> ModelDemand:
        """
        The demand as another pool relieves it.

        Its steps are served by other pools too, so that it is not served at any cost. Its pressure is at most the time
        that the steps which the pool serves while it is fresh would wait: the queue of a model that gets more than can
        be served grows without limit, and would outweigh everything.
        """
        fresh, each = policy.amortise * max(self.load, 1.0), max(self.work / self.steps, 0.1)
        relieved = self.growth / self.steps * self.configuration.slots * fresh / each * fresh / 2
        return replace(self, pressure=min(self.pressure, relieved), due=False, overdue=False, until_deadline=math.inf)


def no_demand(configuration: Configuration) -> ModelDemand:
    """The demand for a model for which no step waits."""
    return ModelDemand(configuration, load_seconds(configuration))


def load_seconds(configuration: Configuration) -> float:
    """Seconds of a start in the first layout; 0 where no layout is known."""
    return configuration.layouts[0].load.total_seconds() if configuration.layouts else 0.0


def fairness(accounts: Mapping[str, Account], namespaces: Iterable[str]) -> dict[str, float]:
    """
    The factor for a second of waiting of each namespace: 1 at its share, up to 2 below it, towards 0 above it.

    Shares are of attained service by weight, as in Tiresias (NSDI 2019) and Themis (NSDI 2020).
    """
    known = {name: accounts.get(name, Account()) for name in namespaces}
    attained = sum(account.attained_seconds for account in known.values())
    weights = sum(account.weight for account in known.values())
    if attained <= 0 or len(known) < 2:
        return dict.fromkeys(known, 1.0)
    return {
        name: 2 / (1 + account.attained_seconds * weights / (attained * account.weight))
        for name, account in known.items()
    }


def model_demand(
    configurations: Iterable[Configuration],
    accounts: Mapping[str, Account],
    waiting: Sequence[WaitingSteps],
    now: datetime,
    policy: PlacementPolicy,
) -> dict[str, ModelDemand]:
    """
    The demand by id of the configuration, for models for which steps wait, or will.

    Steps that wait for a model without a configuration are left out.
    """
    by_model = {configuration.model: configuration for configuration in configurations}
    groups: dict[str, list[WaitingSteps]] = {}
    namespaces = set()
    for group in waiting:
        if (same := groups.get(group.model)) is not None:
            same.append(group)
        elif group.model in by_model:
            groups[group.model] = [group]
        else:
            continue
        namespaces.add(group.namespace)
    fair = fairness(accounts, namespaces)
    exhausted = {
        name for name, account in accounts.items() if account.exhausted_until and account.exhausted_until > now
    }
    found = {}
    for model, same in groups.items():
        configuration = by_model[model]
        found[configuration.id] = _demand(configuration, same, fair, exhausted, now, policy)
    return found


def _demand(
    configuration: Configuration,
    groups: Iterable[WaitingSteps],
    fair: Mapping[str, float],
    exhausted: Collection[str],
    now: datetime,
    policy: PlacementPolicy,
) -> ModelDemand:
    """The demand for one model. There may be thousands of groups: what a class decides is asked once for each class."""
    demand = no_demand(configuration)
    gone = demand.load + policy.unload
    #: By class, its weight, and the waiting times between which a step makes the demand due.
    classes: dict[Priority, tuple[float, float, float]] = {}
    #: By class, the waiting time of the oldest.
    longest: dict[Priority, float] = {}
    pressure = growth = work = 0.0
    steps, until_deadline, namespaces = 0, math.inf, demand.namespaces
    for group in groups:
        namespace, count, priority = group.namespace, group.steps, group.priority
        if namespace in exhausted:
            demand.exhausted[namespace] = demand.exhausted.get(namespace, 0) + count
            continue
        if (known := classes.get(priority)) is None:
            last = policy.target[priority] - demand.load - policy.unload
            known = classes[priority] = policy.weights[priority], last - _BEFORE, last + _AFTER
        weight, due_from, due_until = known
        more = weight * fair[namespace] * count
        if group.ready is not None:
            demand.upcoming += policy.look_ahead * more
            demand.upcoming_in = min(demand.upcoming_in, max((group.ready - now).total_seconds(), 0.0))
            continue
        if (oldest := (now - group.oldest).total_seconds()) < 0:
            oldest = 0.0
        mean = oldest if group.mean is None else max((now - group.mean).total_seconds(), 0.0)
        pressure += more * mean
        growth += more
        steps += count
        work += count * group.work.total_seconds()
        if oldest > longest.get(priority, -1.0):
            longest[priority] = oldest
        if due_from <= oldest <= due_until:
            demand.due = True
        if group.deadline is not None and (left := (group.deadline - now).total_seconds() - gone) < until_deadline:
            until_deadline = left
        namespaces[namespace] = namespaces.get(namespace, 0.0) + more * (mean + 1.0)
    demand.pressure, demand.growth, demand.steps, demand.work = pressure, growth, steps, work
    if longest:
        until_bound = min(policy.bound[priority] - oldest for priority, oldest in longest.items())
        demand.rank = min(priority.rank for priority in longest)
        demand.oldest, demand.until_bound = max(longest.values()), max(until_bound, 0.0)
        demand.overdue = until_bound <= 0 or until_deadline <= 0
    demand.until_deadline = until_deadline
    return demand

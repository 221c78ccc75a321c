"""
Reasons: the texts of actions and refusals, with figures, for users and operators.

Sizes are bytes on devices; times are seconds. Waiting time that is weighted by class is called weighted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import median

from app.fleet.backoff import Backoff
from app.fleet.host import HostState
from app.kernel.units.sizes import rounded
from app.scheduler.planner.arrivals import ArrivalPattern
from app.scheduler.planner.candidate import PlacementCandidate, Vacancy
from app.scheduler.planner.cluster import SIMULATED, Account, Cluster, Configuration, Pool
from app.scheduler.planner.demand import ModelDemand, load_seconds
from app.scheduler.planner.device_sets import DeviceSets
from app.scheduler.planner.state import DeviceSet, PlanState

NO_DEMAND = "no step waits for it any more"


@dataclass(frozen=True, slots=True)
class RefusalReason:
    """Why nothing is done for waiting steps now."""

    text: str
    #: Seconds until they are expected to begin; None when waiting alone does not help.
    estimate: float | None = None


class Names:
    """Names of devices and pools for people."""

    def __init__(self, fleet: Cluster) -> None:
        self._devices = {device.id: device for device in fleet.devices}
        self._has_hosts = len({device.host for device in fleet.devices}) > 1
        self._models = {configuration.id: configuration.model for configuration in fleet.configurations}

    def device(self, id_: str) -> str:
        """The name of a device, with its host where there are several hosts."""
        device = self._devices.get(id_)
        if device is None:
            return id_
        return f"{device.name} of {device.host}" if self._has_hosts else device.name

    def devices(self, ids: Iterable[str]) -> str:
        """Names of devices, joined with `and`."""
        return _listed([self.device(id_) for id_ in sorted(ids)])

    def pool(self, pool: Pool) -> str:
        """The name of the model of a pool."""
        return f"`{self._models.get(pool.configuration, pool.configuration)}`"

    def pools(self, pools: Iterable[Pool]) -> str:
        """Names of models of pools, each once, joined with `and`."""
        return _listed(sorted({self.pool(pool) for pool in pools}))


def seconds(value: float) -> str:
    """A duration for people: `0.4 s`, `12 s`, `4 min`."""
    if value < 1:
        return f"{value:.1f} s"
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.0f} min"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "nothing"


def _steps(count: int, verb: str = "wait") -> str:
    return f"1 step {verb}s" if count == 1 else f"{count} steps {verb}"


def _waiting(demand: ModelDemand) -> str:
    return f"{_steps(demand.steps)}, the oldest for {seconds(demand.oldest)}"


#: The begin of the reason for a start, when a step arrived at this instant.
FIRST = f"{_steps(1)}, the oldest for {seconds(0)}: "


def _place(candidate: PlacementCandidate, names: Names) -> str:
    """The place of a new pool, and the pools that make room."""
    place = f"{rounded(candidate.layout.total_bytes)} on {names.devices(candidate.computing)}"
    if ram := candidate.devices[len(candidate.computing) :]:
        place += f" and {rounded(candidate.layout.ram)} on {names.devices(ram)}"
    if not candidate.victims:
        return f"{place}, which is free"
    stopped = sorted({names.pool(pool) for pool in candidate.victims})
    return f"{place}, for which {_listed(stopped)} {'makes' if len(stopped) == 1 else 'make'} room"


def started(demand: ModelDemand, candidate: PlacementCandidate, coming: Collection[Pool], names: Names) -> str:
    """Why a pool is started for steps that wait."""
    pools = f", and {len(coming)} {'pool does' if len(coming) == 1 else 'pools do'} not suffice" if coming else ""
    overdue = "; it waited beyond its bound" if demand.overdue else ""
    return f"{_waiting(demand)}{pools}{overdue}: {_place(candidate, names)}"


def prepared(demand: ModelDemand, candidate: PlacementCandidate, names: Names) -> str:
    """Why a pool is started for steps that are not ready yet."""
    return f"steps of running workflows will be ready in {seconds(demand.upcoming_in)}: {_place(candidate, names)}"


def expected(pattern: ArrivalPattern, now: datetime, candidate: PlacementCandidate, names: Names) -> str:
    """Why a pool is started for a model before it is requested."""
    return f"{usual(pattern, now)}: {_place(candidate, names)}"


def usual(pattern: ArrivalPattern, now: datetime) -> str:
    """How often a model is requested."""
    idle = (now - pattern.last).total_seconds()
    return f"it is requested about every {seconds(median(pattern.gaps))}, and was last {seconds(idle)} ago"


def target(configuration: Configuration, candidate: PlacementCandidate, names: Names) -> str:
    """Why a pool is started for which no step waits."""
    count = configuration.min_pools
    if not count:
        return f"an operator wants it: {_place(candidate, names)}"
    return f"{count} {'pool is' if count == 1 else 'pools are'} kept running: {_place(candidate, names)}"


def evacuated(candidate: PlacementCandidate, names: Names) -> str:
    """Why another pool is started in the place of one on a drained device."""
    return f"its device is drained: {_place(candidate, names)}"


def makes_room(victim: Pool, demand: ModelDemand, regret: float) -> str:
    """Why a pool is evicted."""
    state = _steps(victim.busy, "run") if victim.busy else "it is idle"
    waits = f": {_waiting(demand)}" if demand.steps else ""
    return (
        f"makes room for `{demand.configuration.model}`{waits} ({demand.pressure:.0f} s, weighted); "
        f"{state}, and stopping it is expected to cost {regret:.0f} s, weighted"
    )


def preempted(victim: Pool, demand: ModelDemand, reclaims: bool) -> str:
    """Why the steps of a pool that drains are preempted."""
    state = _steps(victim.busy, "still run")
    if reclaims and demand.configuration.reserve is not None:
        within = seconds(demand.configuration.reserve.within.total_seconds())
        return f"{state}, and `{demand.configuration.model}` needs its reserve back within {within}"
    return f"{state}, and the more urgent `{demand.configuration.model}` waits for this memory"


def withdrawn(owner: Configuration) -> str:
    """Why a grant that waits for bytes of a reserve is withdrawn."""
    return f"it waits for bytes that are reserved for `{owner.model}`, for which steps wait"


def moved(reason: str, candidate: PlacementCandidate, names: Names) -> str:
    """Why a pool is moved."""
    return f"{reason}; it moves to {_place(candidate, names)}"


def idle(for_: timedelta, keep_alive: timedelta) -> str:
    """Why an idle pool is stopped."""
    return f"no work for {seconds(for_.total_seconds())}, it is kept for {seconds(keep_alive.total_seconds())}"


def idle_replica(for_: timedelta) -> str:
    """Why one of several pools of a model is stopped."""
    return f"no work for {seconds(for_.total_seconds())}, and other pools serve the model"


def drained(devices: Collection[str], names: Names) -> str:
    """Why a pool is stopped, or a reserve dropped."""
    return f"{names.devices(devices)} {'is' if len(devices) == 1 else 'are'} drained"


def reserve_granted(configuration: Configuration, bytes_: Mapping[str, int], names: Names) -> str:
    """Why bytes are reserved."""
    return f"`{configuration.model}` reserves {rounded(sum(bytes_.values()))} on {names.devices(bytes_)}"


def reserve_dropped(wanted: int) -> str:
    """Why a reserve is dropped; `wanted` is the number of reserves that the entry asks for."""
    return f"its entry asks for {wanted} reserves now" if wanted else "its entry asks for no reserve any more"


def reserve_outgrown(configuration: Configuration, sizes: Iterable[int]) -> str:
    """Why a reserve is replaced."""
    return f"`{configuration.model}` needs {rounded(smallest(configuration))}, and {rounded(sum(sizes))} are reserved"


def no_reserve(needs: int) -> str:
    """Why no bytes are reserved."""
    return f"no device set has {rounded(needs)} that are neither reserved nor held by pinned pools"


def next_plan(starts: int, demand: ModelDemand) -> RefusalReason:
    """Why a plan starts no more pools."""
    return RefusalReason(f"one plan starts at most {starts} pools; the next plan continues", demand.load)


def exhausted(demand: ModelDemand, accounts: Mapping[str, Account], now: datetime) -> RefusalReason:
    """Why nothing is done for namespaces that used up their allowance of device seconds."""
    names = sorted(demand.exhausted)
    until = min(account.exhausted_until for name in names if (account := accounts[name]).exhausted_until)
    after = max((until - now).total_seconds(), 0.0)
    plural = len(names) > 1
    steps, namespaces = _steps(sum(demand.exhausted.values())), f"namespace{'s' * plural} {_listed(names)}"
    used_up = f"{'have' if plural else 'has'} used up {'their' if plural else 'its'} device seconds"
    return RefusalReason(f"{steps}, but {namespaces} {used_up}; the next period begins in {seconds(after)}", after)


def beyond_bytes(
    demand: ModelDemand, candidate: PlacementCandidate, accounts: Mapping[str, Account], held: Mapping[str, int]
) -> RefusalReason:
    """Why a namespace gets no further pool."""
    name = max(demand.namespaces, key=lambda one: (demand.namespaces[one], one))
    return RefusalReason(
        f"needs {rounded(candidate.total_bytes)}, and namespace {name} holds {rounded(held[name])} "
        f"of the {rounded(accounts[name].max_bytes or 0)} that it may hold"
    )


def not_worth(
    demand: ModelDemand,
    candidate: PlacementCandidate,
    price: float,
    drain_wait: float,
    names: Names,
    state: PlanState,
) -> RefusalReason:
    """
    Why pools that could be evicted are not, yet: the pressure is below the price, or a drain is put off.

    The estimate does not count the wait before a drain: a pool with short steps is most often idle before that ends.
    """
    missing = max(price - demand.pressure, 0.0) / demand.growth if demand.growth else 0.0
    put_off = max(drain_wait - demand.oldest, 0.0)
    latest = min(demand.until_bound, demand.until_deadline)
    later = min(max(missing, put_off), latest)
    cost = f"evicting {names.pools(candidate.victims)} would cost {candidate.regret:.0f} s, weighted, and is done after"
    if missing >= put_off:
        condition = f"{price:.0f} s of waiting: {demand.pressure:.0f} s so far"
    else:
        condition = (
            f"a step has waited for {seconds(drain_wait)}, as a drain would take long: {seconds(demand.oldest)} so far"
        )
    text = (
        f"needs {rounded(candidate.layout.total_bytes)}, {_has_free(candidate.devices, names, state)}; "
        f"{cost} {condition}, about {seconds(later)} to go"
    )
    return RefusalReason(text, min(missing, latest) + candidate.estimate)


def blocked(demand: ModelDemand, vacancy: Vacancy, names: Names, state: PlanState) -> RefusalReason:
    """Why demand waits for pools that are not evicted."""
    configuration, devices = demand.configuration, vacancy.devices
    needs = min(one.total_bytes for one in configuration.layouts if len(one.parts) == len(state.computing(devices)))
    work = sum(pool.busy for pool in vacancy.pools)
    cause = f"with {work} {'step' if work == 1 else 'steps'} in flight" if work else "which loaded only recently"
    nominated = state.nominated.get(devices[0])
    is_kept = nominated is not None and nominated[0] == configuration.id
    kept = "; until then only pools that end earlier are started there" if is_kept else ""
    text = (
        f"needs {rounded(needs)}, {_has_free(devices, names, state)}; "
        f"it waits for {names.pools(vacancy.pools)} {cause}: about {seconds(vacancy.seconds)}{kept}"
    )
    return RefusalReason(text, vacancy.seconds + demand.load)


def never(
    configuration: Configuration, sets: DeviceSets, state: PlanState, backoffs: Sequence[Backoff], now: datetime
) -> RefusalReason:
    """Why waiting does not help, or only until something changes."""
    is_simulated = any(layout.type == SIMULATED for layout in configuration.layouts)
    if configuration.fetch is None and not configuration.files and not is_simulated:
        return RefusalReason(_without_file(configuration))
    if not configuration.layouts:
        return RefusalReason("its footprint is not known yet on any device")
    if backoffs:
        backoff = min(backoffs, key=lambda one: (one.until, one.host))
        after = max((backoff.until - now).total_seconds(), 0.0)
        text = f"on {backoff.host}, {backoff.reason}; tried again in {seconds(after)}"
        return RefusalReason(text, after + load_seconds(configuration))
    return RefusalReason(_obstacle(configuration, sets, state))


def _without_file(configuration: Configuration) -> str:
    """Why no host can load the file, and what a user does about it."""
    if not configuration.unusable:
        return f"no host has its file; {configuration.installation}"
    found = (f"on {host}, {reason}" for host, reason in sorted(configuration.unusable.items()))
    return f"no host can use its file: {'; '.join(found)}"


def _obstacle(configuration: Configuration, sets: DeviceSets, state: PlanState) -> str:
    """Why no device set can have the bytes free."""
    layouts = configuration.layouts
    types = sorted({layout.type for layout in layouts})
    listed = " or ".join(types)
    devices = [device for device in state.devices.values() if device.type in types]
    if not devices:
        return f"there is no device of the type {listed}"
    if all(device.state is not HostState.SCHEDULABLE for device in devices):
        return f"no device of the type {listed} is schedulable: all are cordoned, drained or lost"
    part = min(max(layout.parts) for layout in layouts)
    largest = max(devices, key=lambda device: (state.usable[device.id], device.id))
    if part > state.usable[largest.id]:
        unmanaged = " without its unmanaged memory" if largest.unmanaged_bytes else ""
        has = rounded(state.usable[largest.id])
        return f"needs {rounded(part)} on one device, and the largest, {largest.name}, has {has}{unmanaged}"
    if not any(sets.has_ram(configuration, layout, device.id) for layout in layouts for device in devices):
        least = rounded(min(layout.ram for layout in layouts))
        return f"needs {least} of RAM in addition to GPUs, and no host can have that free"
    return (
        f"needs {rounded(smallest(configuration))}, and no device set that its entry allows can have that free: bytes "
        "are pinned, reserved or held by processes that may still be alive, models are kept apart, or a host has too "
        "few devices"
    )


def makes_hole(configuration: Configuration, devices: DeviceSet, target: PlacementCandidate, names: Names) -> str:
    """Why a pool is moved in a defragmentation."""
    return f"leaves {names.devices(devices)} to `{configuration.model}`, and moves to {_place(target, names)}"


def gained(configuration: Configuration, free: int, moves: int, load: float) -> str:
    """What the moves achieve."""
    return (
        f"`{configuration.model}` {_fitted_nowhere(configuration, free)}; after "
        f"{moves} {'move, which loads' if moves == 1 else 'moves, which load'} for {seconds(load)}, it fits"
    )


def no_moves(configuration: Configuration, free: int, cheapest: tuple[int, float] | None) -> str:
    """Why nothing is moved for a model that fits nowhere."""
    begins = _fitted_nowhere(configuration, free)
    if cheapest is None:
        return f"{begins}; no moves of idle pools help"
    moves, load = cheapest
    which = "move, which loads" if moves == 1 else "moves, which load"
    return f"{begins}; it would take {moves} {which} for {seconds(load)}: more than the budget allows"


def _fitted_nowhere(configuration: Configuration, free: int) -> str:
    return f"needs {rounded(smallest(configuration))} and fits nowhere, though {rounded(free)} are free in total"


def smallest(configuration: Configuration) -> int:
    """Bytes of its smallest layout."""
    return min((layout.total_bytes for layout in configuration.layouts), default=0)


def _has_free(devices: DeviceSet, names: Names, state: PlanState) -> str:
    computing = state.computing(devices)
    free = sum(max(state.free[device], 0) for device in computing)
    found = f"{names.devices(computing)} {'has' if len(computing) == 1 else 'have'} {rounded(free)} free"
    ram = [f"{names.device(id_)} {rounded(max(state.free[id_], 0))}" for id_ in devices if id_ not in computing]
    return " and ".join((found, *ram))

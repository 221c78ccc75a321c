"""
Reasons: what a plan says about itself, in words and figures that its users understand.

Sizes are bytes on devices, waiting is in seconds. What waiting counts is weighted by class, and called so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta

from app.fleet.backoff import Backoff
from app.kernel.units.sizes import rounded
from app.scheduler.cluster import Account, Cluster, Configuration, DeviceState, Pool
from app.scheduler.needs import SIMULATED
from app.scheduler.option import Option
from app.scheduler.pressure import ConfigurationDemand, load_of
from app.scheduler.room import DeviceSet, Room

NOBODY_WAITS = "nobody waits for it any more"

#: What is said, and seconds until the steps that wait are expected to begin.
Why = tuple[str, float | None]


class Names:
    """What people call devices and pools."""

    def __init__(self, fleet: Cluster) -> None:
        hosts = {device.host for device in fleet.devices}
        self._devices = {d.id: f"{d.name} of {d.host}" if len(hosts) > 1 else d.name for d in fleet.devices}
        self._models = {configuration.id: configuration.model for configuration in fleet.configurations}

    def device(self, id_: str) -> str:
        """Its name, with its host where there are several."""
        return self._devices.get(id_, id_)

    def devices(self, ids: Iterable[str]) -> str:
        """Names with `and`."""
        return _listed([self.device(id_) for id_ in sorted(ids)])

    def pool(self, pool: Pool) -> str:
        """By its model."""
        return f"`{self._models.get(pool.configuration, pool.configuration)}`"

    def pools(self, pools: Iterable[Pool]) -> str:
        """Each once, with `and`."""
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


def _waiting(want: ConfigurationDemand) -> str:
    return f"{_steps(want.steps)}, the oldest for {seconds(want.oldest)}"


#: Begins the reason of a start for a step that came this instant.
FIRST = f"{_steps(1)}, the oldest for {seconds(0)}: "


def _place(option: Option, names: Names) -> str:
    """Where it goes, and who makes room."""
    place = f"{rounded(option.layout.total_bytes)} on {names.devices(option.computing)}"
    if beside := option.devices[len(option.computing) :]:
        place += f" and {rounded(option.layout.ram)} on {names.devices(beside)}"
    if not option.victims:
        return f"{place}, which is free"
    stopped = sorted({names.pool(pool) for pool in option.victims})
    return f"{place}, for which {_listed(stopped)} {'makes' if len(stopped) == 1 else 'make'} room"


def started(want: ConfigurationDemand, option: Option, coming: Sequence[Pool], names: Names) -> str:
    """Why a pool is started for steps that wait."""
    beside = f" beside {len(coming)} that do not suffice" if coming else ""
    late = "; it waited beyond its bound" if want.must else ""
    return f"{_waiting(want)}{beside}{late}: {_place(option, names)}"


def prepared(want: ConfigurationDemand, option: Option, names: Names) -> str:
    """Why a pool is started for steps that do not wait yet."""
    return f"steps of running work will be ready in {seconds(want.soon)}: {_place(option, names)}"


def target(configuration: Configuration, option: Option, names: Names) -> str:
    """Why a pool is started that nobody waits for."""
    count = configuration.min_pools
    if not count:
        return f"an operator wants it: {_place(option, names)}"
    return f"{count} {'pool is' if count == 1 else 'pools are'} kept up: {_place(option, names)}"


def evacuated(option: Option, names: Names) -> str:
    """Why a pool is started again elsewhere."""
    return f"its device is drained: {_place(option, names)}"


def makes_room(victim: Pool, want: ConfigurationDemand, regret: float) -> str:
    """Why a pool is stopped for another."""
    state = _steps(victim.busy, "run") if victim.busy else "it is idle"
    waits = f": {_waiting(want)}" if want.steps else ""
    return (
        f"makes room for `{want.configuration.model}`{waits} ({want.pressure:.0f} s, weighted); "
        f"{state}, and stopping it is expected to cost {regret:.0f} s, weighted"
    )


def hands_back(victim: Pool, want: ConfigurationDemand, reclaims: bool) -> str:
    """Why a pool that drains does not finish its steps."""
    state = f"{_steps(victim.busy, 'run')} for longer than"
    if reclaims and want.configuration.reserve is not None:
        within = seconds(want.configuration.reserve.within.total_seconds())
        return f"{state} `{want.configuration.model}` lends its reserve on: it comes back within {within}"
    return f"{state} the more urgent `{want.configuration.model}` waits for them"


def recalled(owner: Configuration) -> str:
    """Why a grant is taken back that waits for bytes of a reserve."""
    return f"it waits for bytes that are set aside for `{owner.model}`, which is asked for"


def moved(reason: str, option: Option, names: Names) -> str:
    """Why a pool is moved."""
    return f"{reason}; it goes on with {_place(option, names)}"


def idle(for_: timedelta, keep_alive: timedelta) -> str:
    """Why a pool that nobody uses is stopped."""
    return f"no work for {seconds(for_.total_seconds())}, it is kept for {seconds(keep_alive.total_seconds())}"


def idle_replica(for_: timedelta) -> str:
    """Why one of several pools is stopped."""
    return f"no work for {seconds(for_.total_seconds())}, and other pools serve the model"


def drained(devices: Collection[str], names: Names) -> str:
    """Why a pool or a reserve leaves devices."""
    return f"{names.devices(devices)} {'is' if len(devices) == 1 else 'are'} drained"


def reserve_granted(configuration: Configuration, bytes_: Mapping[str, int], names: Names) -> str:
    """Why bytes are set aside."""
    return f"`{configuration.model}` reserves {rounded(sum(bytes_.values()))} on {names.devices(bytes_)}"


def reserve_dropped(asked: int) -> str:
    """Why a reserve is taken back."""
    return f"its entry asks for {asked} reserves now" if asked else "its entry asks for no reserve any more"


def reserve_outgrown(configuration: Configuration, sizes: Iterable[int]) -> str:
    """Why a reserve is set aside anew."""
    return f"`{configuration.model}` needs {rounded(smallest(configuration))}, and {rounded(sum(sizes))} are set aside"


def no_reserve(needs: int) -> str:
    """Why no bytes are set aside."""
    return f"no device set has {rounded(needs)} that are neither set aside nor held by pinned pools"


def next_plan(starts: int) -> str:
    """Why a plan stops where it does."""
    return f"{starts} pools are started at once at the most; the next plan goes on"


def exhausted(want: ConfigurationDemand, accounts: Mapping[str, Account], now: datetime) -> Why:
    """Why nothing is done for namespaces that used their allowance up."""
    names = sorted(want.exhausted)
    until = min(account.exhausted_until for name in names if (account := accounts[name]).exhausted_until)
    after = max((until - now).total_seconds(), 0.0)
    plural = len(names) > 1
    return (
        f"{_steps(sum(want.exhausted.values()))}, but {'namespaces' if plural else 'namespace'} {_listed(names)} used "
        f"{'their' if plural else 'its'} device seconds up; there are new ones in {seconds(after)}"
    ), after


def beyond_bytes(
    want: ConfigurationDemand, option: Option, accounts: Mapping[str, Account], used: Mapping[str, int]
) -> Why:
    """Why a namespace gets no further pool."""
    name = max(want.namespaces, key=lambda one: (want.namespaces[one], one))
    return (
        f"needs {rounded(option.layout.total_bytes)}, and namespace {name} holds {rounded(used[name])} "
        f"of the {rounded(accounts[name].max_bytes or 0)} that it may"
    ), None


def not_worth(want: ConfigurationDemand, option: Option, price: float, names: Names, room: Room) -> Why:
    """Why pools that could be stopped are not, yet."""
    later = min(max(price - want.pressure, 0.0) / want.growth, want.bound) if want.growth else 0.0
    return (
        f"needs {rounded(option.layout.total_bytes)}, {_has_free(option.devices, names, room)}; stopping "
        f"{names.pools(option.victims)} would cost {option.regret:.0f} s, weighted, and is done when {price:.0f} s "
        f"were waited: {want.pressure:.0f} s so far, about {seconds(later)} to go"
    ), later + option.estimate


def blocked(
    want: ConfigurationDemand, after: float, devices: DeviceSet, waited: Sequence[Pool], names: Names, room: Room
) -> Why:
    """Why pools that hold the bytes are waited for."""
    needs = min(one.total_bytes for one in want.configuration.layouts if len(one.parts) == len(room.computing(devices)))
    work = sum(pool.busy for pool in waited)
    flight = f"with {work} {'step' if work == 1 else 'steps'} in flight"
    state = flight if work else "whose starts must pay first"
    held = room.held.get(devices[0])
    kept = "; until then nothing is started there that ends later" if held and held[0] == want.configuration.id else ""
    return (
        f"needs {rounded(needs)}, {_has_free(devices, names, room)}; it waits for {names.pools(waited)} {state}: "
        f"about {seconds(after)}{kept}"
    ), after + want.load


def never(configuration: Configuration, room: Room, backoffs: Sequence[Backoff], now: datetime) -> Why:
    """Why no waiting helps, or only until something changes."""
    stand_ins = any(layout.type == SIMULATED for layout in configuration.layouts)
    if configuration.fetch is None and not configuration.files and not stand_ins:
        return f"no host has its file; `arriero models show {configuration.model}` says how to bring it there", None
    if not configuration.layouts:
        return "what it needs is not known yet on any device", None
    if backoffs:
        backoff = min(backoffs, key=lambda one: (one.until, one.host))
        after = max((backoff.until - now).total_seconds(), 0.0)
        return f"on {backoff.host}, {backoff.reason}; tried again in {seconds(after)}", after + load_of(configuration)
    kinds = sorted({layout.type for layout in configuration.layouts})
    types = " or ".join(kinds)
    devices = [device for device in room.devices.values() if device.type in kinds]
    if not devices:
        return f"there is no device of the type {types}", None
    if all(device.state is not DeviceState.SCHEDULABLE for device in devices):
        return f"no device of the type {types} is open: they are cordoned, drained or lost", None
    part = min(max(layout.parts) for layout in configuration.layouts)
    largest = max(devices, key=lambda device: (room.usable(device.id), device.id))
    if part > room.usable(largest.id):
        beside = " beside what others use of it" if largest.unmanaged_bytes else ""
        has = rounded(room.usable(largest.id))
        return f"needs {rounded(part)} on one device, and the largest, {largest.name}, has {has}{beside}", None
    if not any(room.has_ram(configuration, one, device.id) for one in configuration.layouts for device in devices):
        least = rounded(min(layout.ram for layout in configuration.layouts))
        return f"needs {least} of its host's RAM beside a GPU, and no host can have that free", None
    return (
        f"needs {rounded(smallest(configuration))}, and no device set that its entry allows can have that free: bytes "
        "are pinned, set aside or held by processes that may still live, models are kept apart, or a host has too few "
        "devices"
    ), None


def makes_hole(configuration: Configuration, devices: DeviceSet, target: Option, names: Names) -> str:
    """Why a pool is moved though nobody waits."""
    return f"leaves {names.devices(devices)} to `{configuration.model}`, and goes on with {_place(target, names)}"


def gained(configuration: Configuration, free: int, moves: int, load: float) -> str:
    """What moves bring."""
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
    return f"{begins}; it would take {moves} {which} for {seconds(load)}: more than may be disturbed"


def _fitted_nowhere(configuration: Configuration, free: int) -> str:
    return f"needs {rounded(smallest(configuration))} and fits nowhere, though {rounded(free)} are free in all"


def smallest(configuration: Configuration) -> int:
    """Bytes of its smallest layout."""
    return min((layout.total_bytes for layout in configuration.layouts), default=0)


def _has_free(devices: DeviceSet, names: Names, room: Room) -> str:
    computing = room.computing(devices)
    free = sum(max(room.free[device], 0) for device in computing)
    found = f"{names.devices(computing)} {'has' if len(computing) == 1 else 'have'} {rounded(free)} free"
    beside = [f"{names.device(id_)} {rounded(max(room.free[id_], 0))}" for id_ in devices if id_ not in computing]
    return " and ".join((found, *beside))

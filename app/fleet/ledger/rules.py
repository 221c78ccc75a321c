"""
The rules of the ledger: each takes a ledger and returns the next one.

The ledger says which reservation holds how many bytes of which device, and until when.
A pool may use only bytes that are reserved here.
A claim is granted on all its devices, or refused with the reason; it is never granted in part.
No device is charged above its capacity, and the bytes of a victim are promised only once.
A reservation whose lease has expired stays charged until its host's agent has seen the process dead and the memory
free, or the host is declared lost. Nothing is granted on a lost host before its agent has joined again.
A stale epoch and a released reservation are rejected.

A claim may be backed by victims: pools that drain. Bytes that they cover are not charged twice; when the victims have
ended, these bytes pass to that claim and to no other.

Nothing here reads a clock or a database: the caller passes `now` and stores the new ledger.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime

from app.fleet.ledger.reservation import (
    TRANSITIONS,
    DeviceCapacity,
    Ledger,
    Reservation,
    ReservationEvent,
    ReservationRefused,
    ReservationRequest,
    ReservationState,
    ReservedCapacity,
)
from app.kernel.errors import LeaseLost
from app.kernel.units.sizes import rounded


def claim(ledger: Ledger, wanted: ReservationRequest) -> Ledger | ReservationRefused:
    """Grant a claim: bytes that its victims cover are promised to it, the others are charged now."""
    if refusal := _unusable(ledger, wanted) or _beyond_quota(ledger, wanted.namespace, sum(wanted.bytes.values())):
        return refusal
    backing = _backing(ledger, wanted)
    granted = Reservation(
        id=wanted.id,
        epoch=wanted.epoch,
        revision=0,
        state=ReservationState.HELD,
        host=wanted.host,
        configuration=wanted.configuration,
        bytes=dict(wanted.bytes),
        lease_until=wanted.lease_until,
        backing=backing,
        pinned=wanted.pinned,
        namespace=wanted.namespace,
    )
    for device in wanted.bytes:
        need, free = granted.charge(device), ledger.free(device)
        if need > free:
            return ReservationRefused(f"needs {rounded(need)} of {device}, which has {rounded(free)} free")
    return _non_preemptible_fits(_put(ledger, granted))


def activate(ledger: Ledger, id_: str, agent: int, lease_until: datetime) -> Ledger:
    """
    Allow a process to use the bytes from now on. Only the host's agent may do so.

    Raises LeaseLost when the reservation is no longer held or waits for victims, and for the epoch of another agent.
    """
    held = _of_agent(ledger, id_, agent)
    if held.backing:
        raise LeaseLost(f"reservation {id_} waits for bytes of other pools")
    return _put(ledger, replace(_after(held, ReservationEvent.ACTIVATE), lease_until=lease_until))


def renew(ledger: Ledger, id_: str, epoch: int, lease_until: datetime) -> Ledger:
    """Extend the lease of a holder. Raises LeaseLost when it was released, or the epoch is another."""
    return _put(
        ledger, replace(_after(_of_holder(ledger, id_, epoch), ReservationEvent.RENEW), lease_until=lease_until)
    )


def adjust(
    ledger: Ledger, id_: str, epoch: int, revision: int, wanted: Mapping[str, int]
) -> Ledger | ReservationRefused:
    """
    Change the bytes of a holder on its devices: a reduction is always granted, an increase if the bytes are free.

    `revision` is the reservation's revision that the holder knows, so that a late call changes nothing.

    Raises LeaseLost as `renew` does, and for another revision.
    """
    held = _of_holder(ledger, id_, epoch)
    if held.revision != revision:
        raise LeaseLost(f"reservation {id_} was adjusted meanwhile: its revision is {held.revision}, not {revision}")
    if wanted.keys() != held.bytes.keys() or any(size <= 0 for size in wanted.values()):
        return ReservationRefused(
            f"an adjustment needs bytes above 0 for each device of the reservation: {', '.join(sorted(held.bytes))}"
        )
    if held.draining:
        return ReservationRefused("it drains: its bytes may be promised to others, and cannot change")
    changed = replace(_after(held, ReservationEvent.ADJUST), bytes=dict(wanted), revision=revision + 1)
    if refusal := _beyond_quota(ledger, held.namespace, changed.total_bytes - held.total_bytes):
        return refusal
    for device, size in wanted.items():
        more, free = size - held.bytes[device], ledger.free(device)
        if more > max(free, 0):
            return ReservationRefused(
                f"needs {rounded(size)} of {device} and has {rounded(held.bytes[device])}; {rounded(free)} are free"
            )
    return _non_preemptible_fits(_put(ledger, changed))


def drain(ledger: Ledger, id_: str) -> Ledger:
    """Mark a reservation as draining: it may back other claims from now on, and its bytes no longer change."""
    return _put(ledger, replace(_after(_get(ledger, id_), ReservationEvent.DRAIN), draining=True))


def cancel(ledger: Ledger, id_: str) -> Ledger:
    """Release a reservation whose bytes no process may touch yet. Raises LeaseLost when one may."""
    return _put(ledger, _after(_get(ledger, id_), ReservationEvent.CANCEL))


def release(ledger: Ledger, id_: str, agent: int) -> Ledger:
    """Release a reservation: the host's agent saw the process dead and its memory free. Raises LeaseLost for others."""
    return _put(ledger, _after(_of_agent(ledger, id_, agent), ReservationEvent.RELEASE))


def expire(ledger: Ledger, now: datetime) -> Ledger:
    """Expire the leases that ended before `now`: a held reservation is released, an active one becomes suspect."""
    for held in list(ledger.reservations.values()):
        if held.lease_until < now:
            ledger = _put(ledger, _after(held, ReservationEvent.EXPIRE))
    return ledger


def declare_host_lost(ledger: Ledger, host: str) -> Ledger:
    """Release all reservations of a host and close its devices. Its agent's epoch is no longer valid."""
    for held in [one for one in ledger.reservations.values() if one.host == host]:
        ledger = _put(ledger, _after(held, ReservationEvent.HOST_LOST))
    devices = {id_: replace(one, open=one.open and one.host != host) for id_, one in ledger.devices.items()}
    agents = {name: epoch for name, epoch in ledger.agents.items() if name != host}
    reserves = {id_: one for id_, one in ledger.reserves.items() if not _is_on(ledger, one.bytes, host)}
    return replace(ledger, devices=devices, agents=agents, reserves=reserves)


def join(ledger: Ledger, host: str, agent: int, capacities: Mapping[str, int]) -> Ledger:
    """
    Make an agent the one that speaks for its host, with these capacities of its devices; earlier epochs become stale.

    The agent has ended every process without a reservation. A device that is gone, or smaller than its charged bytes,
    keeps the capacity that is charged until those bytes are released.
    """
    devices = dict(ledger.devices)
    for id_, device in ledger.devices.items():
        if device.host == host and id_ not in capacities:
            devices[id_] = DeviceCapacity(host, _committed(ledger, id_), open=False)
    for id_, capacity in capacities.items():
        devices[id_] = DeviceCapacity(host, max(capacity, _committed(ledger, id_)))
    return replace(ledger, devices=devices, agents={**ledger.agents, host: agent})


def add_reserve(ledger: Ledger, reserve: ReservedCapacity) -> Ledger | ReservationRefused:
    """Guarantee bytes to a configuration before it is loaded. Other pools may borrow them, but no pinned pool may."""
    if unknown := [device for device in reserve.bytes if device not in ledger.devices]:
        return ReservationRefused(f"there is no device {', '.join(unknown)}")
    return _non_preemptible_fits(replace(ledger, reserves={**ledger.reserves, reserve.id: reserve}))


def drop_reserve(ledger: Ledger, id_: str) -> Ledger:
    """Remove a reserve. One that does not exist changes nothing."""
    return replace(ledger, reserves={key: one for key, one in ledger.reserves.items() if key != id_})


def problems(ledger: Ledger) -> list[str]:
    """Return every violation of the promises above; a correct ledger has none."""
    found = []
    for id_, sums in ledger.sums().items():
        capacity = ledger.devices[id_].capacity
        for what, size in zip(("charged", "non-preemptible"), sums, strict=True):
            if not 0 <= size <= capacity:
                found.append(f"{id_}: {size} bytes of {capacity} are {what}")
    for one in ledger.reservations.values():
        for device in one.bytes:
            if (promised := ledger.promised(one.id, device)) > one.bytes[device]:
                found.append(f"{one.id} promises {promised} of its {one.bytes[device]} bytes of {device}")
            if one.charge(device) < 0:
                found.append(f"{one.id} is charged with {one.charge(device)} bytes of {device}")
        if one.backing and one.state is not ReservationState.HELD:
            found.append(f"{one.id} is {one.state}, and waits for {', '.join(one.backing)}")
    return found


def _unusable(ledger: Ledger, wanted: ReservationRequest) -> ReservationRefused | None:
    if wanted.id in ledger.reservations:
        return ReservationRefused(f"reservation {wanted.id} already exists")
    if not wanted.bytes or any(size <= 0 for size in wanted.bytes.values()):
        return ReservationRefused("a claim needs at least one device, and bytes above 0 for each")
    for device in wanted.bytes:
        capacity = ledger.devices.get(device)
        if capacity is None or capacity.host != wanted.host:
            return ReservationRefused(f"there is no device {device} on host {wanted.host}")
        if not capacity.open:
            return ReservationRefused(
                f"nothing is granted on {device} now: its host is cordoned or lost, or the device is gone"
            )
    return None


def _beyond_quota(ledger: Ledger, namespace: str, more: int) -> ReservationRefused | None:
    quota = ledger.quotas.get(namespace)
    if quota is None or more <= 0:
        return None
    if quota.exhausted_until is not None:
        return ReservationRefused(
            f"namespace {namespace!r} has used up its device time; its next period begins at "
            f"{quota.exhausted_until:%H:%M}"
        )
    if quota.max_bytes is not None and quota.held_bytes + more > quota.max_bytes:
        has, most = rounded(quota.held_bytes), rounded(quota.max_bytes)
        return ReservationRefused(
            f"namespace {namespace!r} holds {has} of its limit of {most} and requests {rounded(more)} more"
        )
    return None


def _backing(ledger: Ledger, wanted: ReservationRequest) -> dict[str, dict[str, int]]:
    """Return the bytes that each victim covers. A victim must drain, and must not wait for victims itself."""
    left, backing = dict(wanted.bytes), {}
    for id_ in sorted(wanted.after):
        victim = ledger.reservations.get(id_)
        if victim is None or not victim.draining or victim.state is ReservationState.HELD:
            continue
        part = {}
        for device, need in left.items():
            size = min(need, victim.bytes.get(device, 0) - ledger.promised(id_, device))
            if size > 0:
                part[device] = size
                left[device] = need - size
        if part:
            backing[id_] = part
    return backing


def _non_preemptible_fits(ledger: Ledger) -> Ledger | ReservationRefused:
    """Return the ledger, unless reserves and pinned pools exceed the capacity of a device."""
    found = ledger.non_preemptible_sums()
    for id_, device in ledger.devices.items() if found else ():
        if (non_preemptible := found.get(id_, 0)) > (capacity := device.capacity):
            return ReservationRefused(
                f"reserves and pinned pools would need {rounded(non_preemptible)} of {id_}, "
                f"which has {rounded(capacity)}"
            )
    return ledger


def _committed(ledger: Ledger, device: str) -> int:
    return max(ledger.charged(device), ledger.non_preemptible(device))


def _is_on(ledger: Ledger, devices: Iterable[str], host: str) -> bool:
    return any(device in ledger.devices and ledger.devices[device].host == host for device in devices)


def _get(ledger: Ledger, id_: str) -> Reservation:
    if (held := ledger.reservations.get(id_)) is None:
        raise LeaseLost(f"reservation {id_} was released")
    return held


def _of_holder(ledger: Ledger, id_: str, epoch: int) -> Reservation:
    held = _get(ledger, id_)
    if held.epoch != epoch:
        raise LeaseLost(f"reservation {id_} is of epoch {held.epoch}, not {epoch}")
    return held


def _of_agent(ledger: Ledger, id_: str, agent: int) -> Reservation:
    held = _get(ledger, id_)
    if ledger.agents.get(held.host) != agent:
        raise LeaseLost(f"agent {agent} does not speak for host {held.host} any more")
    return held


def _after(held: Reservation, act: ReservationEvent) -> Reservation:
    state = TRANSITIONS.get((held.state, act))
    if state is None:
        raise LeaseLost(f"reservation {held.id} is {held.state}: it cannot be {_DONE[act]}")
    return replace(held, state=state)


_DONE: Mapping[ReservationEvent, str] = {
    ReservationEvent.ACTIVATE: "activated",
    ReservationEvent.RENEW: "renewed",
    ReservationEvent.ADJUST: "adjusted",
    ReservationEvent.DRAIN: "drained",
    ReservationEvent.EXPIRE: "expired",
    ReservationEvent.CANCEL: "cancelled",
    ReservationEvent.RELEASE: "released",
    ReservationEvent.HOST_LOST: "lost",
}


def _put(ledger: Ledger, held: Reservation) -> Ledger:
    """Return the ledger with a reservation in its new state; one that is released leaves the ledger."""
    if held.state is ReservationState.RELEASED:
        return _without(ledger, held)
    before = ledger.reservations.get(held.id)
    more = held.total_bytes - (before.total_bytes if before else 0)
    return _counted(replace(ledger, reservations={**ledger.reservations, held.id: held}), held.namespace, more)


def _without(ledger: Ledger, gone: Reservation) -> Ledger:
    """Remove a reservation: bytes that it promised are charged to the claims that wait for it."""
    left = {}
    for id_, one in ledger.reservations.items():
        if id_ == gone.id:
            continue
        if gone.id in one.backing:
            one = replace(one, backing={key: part for key, part in one.backing.items() if key != gone.id})
        left[id_] = one
    return _counted(replace(ledger, reservations=left), gone.namespace, -gone.total_bytes)


def _counted(ledger: Ledger, namespace: str, more: int) -> Ledger:
    quota = ledger.quotas.get(namespace)
    if quota is None or not more:
        return ledger
    return replace(ledger, quotas={**ledger.quotas, namespace: replace(quota, held_bytes=quota.held_bytes + more)})

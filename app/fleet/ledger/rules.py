"""
The ledger: who holds how many bytes of which device, and until when.

A pool may touch only bytes that are reserved here.
A claim is granted whole, on all its devices, or refused with the reason; it is never squeezed in.
No device is charged above its capacity, and what is promised of a victim is promised once.
A lease that has run out stays charged, until its host's agent has seen the process dead and the bytes back, or the
host is declared lost; on a lost host nothing is granted before its agent has joined anew.
Who names an old epoch, or a reservation that was given back, can do nothing.

A claim may be backed by victims: pools that drain. What they cover is not charged twice; it passes to the claim, and
to nobody else, when they are gone.

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
    """Grant the claim: what its victims cover of each device is promised to it, the rest is charged now."""
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
    Let a process touch the bytes, from now on. Only the host's agent may.

    Raises LeaseLost when it is not held any more, waits for victims, or the agent was replaced.
    """
    held = _of_agent(ledger, id_, agent)
    if held.backing:
        raise LeaseLost(f"reservation {id_} waits for the bytes of others")
    return _put(ledger, replace(_after(held, ReservationEvent.ACTIVATE), lease_until=lease_until))


def renew(ledger: Ledger, id_: str, epoch: int, lease_until: datetime) -> Ledger:
    """Extend the lease of a holder. Raises LeaseLost when it was given back, or the epoch is another."""
    return _put(
        ledger, replace(_after(_of_holder(ledger, id_, epoch), ReservationEvent.RENEW), lease_until=lease_until)
    )


def adjust(
    ledger: Ledger, id_: str, epoch: int, revision: int, wanted: Mapping[str, int]
) -> Ledger | ReservationRefused:
    """
    Change the bytes of a holder, on the devices that it has: less is always granted, more if it is free.

    `revision` is that of the reservation as the holder knows it, so that a call that comes late changes nothing.

    Raises LeaseLost as `renew` does, and for another revision.
    """
    held = _of_holder(ledger, id_, epoch)
    if held.revision != revision:
        raise LeaseLost(f"reservation {id_} was adjusted since: it is at revision {held.revision}, not {revision}")
    if wanted.keys() != held.bytes.keys() or any(size <= 0 for size in wanted.values()):
        return ReservationRefused(
            f"an adjustment names the devices of the reservation, {', '.join(sorted(held.bytes))}, each"
        )
    if held.draining:
        return ReservationRefused("it drains: what it has is promised to others as it is")
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
    """It will end. From now on it may back others, and its bytes stay as they are."""
    return _put(ledger, replace(_after(_get(ledger, id_), ReservationEvent.DRAIN), draining=True))


def cancel(ledger: Ledger, id_: str) -> Ledger:
    """Give back what no process was let near. Raises LeaseLost when one was."""
    _after(held := _get(ledger, id_), ReservationEvent.CANCEL)
    return _without(ledger, held)


def release(ledger: Ledger, id_: str, agent: int) -> Ledger:
    """The host's agent has seen the process dead and the bytes back. Raises LeaseLost when the agent was replaced."""
    _after(held := _of_agent(ledger, id_, agent), ReservationEvent.RELEASE)
    return _without(ledger, held)


def expire(ledger: Ledger, now: datetime) -> Ledger:
    """Give back what no agent took in time; make suspect what was not renewed in time."""
    for held in list(ledger.reservations.values()):
        if held.lease_until < now:
            state = TRANSITIONS[held.state, ReservationEvent.EXPIRE]
            ledger = (
                _without(ledger, held)
                if state is ReservationState.RELEASED
                else _put(ledger, replace(held, state=state))
            )
    return ledger


def lose_host(ledger: Ledger, host: str) -> Ledger:
    """Declare a host lost: nothing is granted on its devices, nothing is held there, and its agent has no say."""
    for held in [one for one in ledger.reservations.values() if one.host == host]:
        ledger = _without(ledger, held)
    devices = {id_: replace(book, open=book.open and book.host != host) for id_, book in ledger.devices.items()}
    agents = {name: epoch for name, epoch in ledger.agents.items() if name != host}
    reserves = {id_: one for id_, one in ledger.reserves.items() if not _is_on(ledger, one.bytes, host)}
    return replace(ledger, devices=devices, agents=agents, reserves=reserves)


def join(ledger: Ledger, host: str, agent: int, capacities: Mapping[str, int]) -> Ledger:
    """
    An agent speaks for the host from now on, and those before it no longer. These are its devices.

    It has ended every process that the ledger does not hold. A device that is gone, or smaller than what is charged on
    it, keeps the capacity that is charged until that is given back.
    """
    devices = dict(ledger.devices)
    for id_, book in ledger.devices.items():
        if book.host == host and id_ not in capacities:
            devices[id_] = DeviceCapacity(host, _committed(ledger, id_), open=False)
    for id_, capacity in capacities.items():
        devices[id_] = DeviceCapacity(host, max(capacity, _committed(ledger, id_)))
    return replace(ledger, devices=devices, agents={**ledger.agents, host: agent})


def add_reserve(ledger: Ledger, reserve: ReservedCapacity) -> Ledger | ReservationRefused:
    """Let a configuration own bytes before it is loaded. Others may borrow them, but no pinned pool may."""
    if unknown := [device for device in reserve.bytes if device not in ledger.devices]:
        return ReservationRefused(f"there is no device {', '.join(unknown)}")
    return _non_preemptible_fits(replace(ledger, reserves={**ledger.reserves, reserve.id: reserve}))


def drop_reserve(ledger: Ledger, id_: str) -> Ledger:
    """Take a reserve back. Nothing happens when it is gone."""
    return replace(ledger, reserves={key: one for key, one in ledger.reserves.items() if key != id_})


def problems(ledger: Ledger) -> list[str]:
    """Everything in which the ledger breaks its promises; nothing, always."""
    found = []
    for id_, book in ledger.devices.items():
        for what, size in (("charged", ledger.charged(id_)), ("non_preemptible", ledger.non_preemptible(id_))):
            if not 0 <= size <= book.capacity:
                found.append(f"{id_}: {size} bytes are {what} of {book.capacity}")
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
        return ReservationRefused(f"reservation {wanted.id} is granted already")
    if not wanted.bytes or any(size <= 0 for size in wanted.bytes.values()):
        return ReservationRefused("a claim names at least one device, and bytes of each")
    for device in wanted.bytes:
        book = ledger.devices.get(device)
        if book is None or book.host != wanted.host:
            return ReservationRefused(f"there is no device {device} on host {wanted.host}")
        if not book.open:
            return ReservationRefused(f"nothing is granted on {device} now: its host is closed or lost, or it is gone")
    return None


def _beyond_quota(ledger: Ledger, namespace: str, more: int) -> ReservationRefused | None:
    quota = ledger.quotas.get(namespace)
    if quota is None or more <= 0:
        return None
    if quota.exhausted_until is not None:
        return ReservationRefused(
            f"namespace {namespace!r} has used its device seconds up, until {quota.exhausted_until:%H:%M}"
        )
    if quota.max_bytes is not None and quota.held_bytes + more > quota.max_bytes:
        has, most = rounded(quota.held_bytes), rounded(quota.max_bytes)
        return ReservationRefused(f"namespace {namespace!r} holds {has} of its {most}, and wants {rounded(more)} more")
    return None


def _backing(ledger: Ledger, wanted: ReservationRequest) -> dict[str, dict[str, int]]:
    """What the victims cover, each in turn. Only a pool that drains and owns its bytes outright is one."""
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
    """The ledger, unless more is set aside or pinned on a device than it has."""
    for id_, book in ledger.devices.items():
        if (non_preemptible := ledger.non_preemptible(id_)) > book.capacity:
            return ReservationRefused(
                f"{rounded(non_preemptible)} of {id_} would be pinned or set aside, of {rounded(book.capacity)}"
            )
    return ledger


def _committed(ledger: Ledger, device: str) -> int:
    return max(ledger.charged(device), ledger.non_preemptible(device))


def _is_on(ledger: Ledger, devices: Iterable[str], host: str) -> bool:
    return any(device in ledger.devices and ledger.devices[device].host == host for device in devices)


def _get(ledger: Ledger, id_: str) -> Reservation:
    if (held := ledger.reservations.get(id_)) is None:
        raise LeaseLost(f"reservation {id_} was given back")
    return held


def _of_holder(ledger: Ledger, id_: str, epoch: int) -> Reservation:
    held = _get(ledger, id_)
    if held.epoch != epoch:
        raise LeaseLost(f"reservation {id_} is of epoch {held.epoch}, not {epoch}")
    return held


def _of_agent(ledger: Ledger, id_: str, agent: int) -> Reservation:
    held = _get(ledger, id_)
    if ledger.agents.get(held.host) != agent:
        raise LeaseLost(f"another agent speaks for host {held.host}, or none")
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
    ReservationEvent.LOSE: "lost",
}


def _put(ledger: Ledger, held: Reservation) -> Ledger:
    before = ledger.reservations.get(held.id)
    more = held.total_bytes - (before.total_bytes if before else 0)
    return _counted(replace(ledger, reservations={**ledger.reservations, held.id: held}), held.namespace, more)


def _without(ledger: Ledger, gone: Reservation) -> Ledger:
    """Take a reservation out: what it promised is now charged to those who wait for it."""
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

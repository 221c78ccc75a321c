"""
A reservation: a claim on bytes of devices that was granted, and what the ledger knows beside it. Values only.

`TRANSITIONS` is the table of its states: an edge that is absent is the error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class ReservedCapacity:
    """A reserve that was granted: bytes that a configuration owns on a set of devices."""

    id: str
    #: Id of the configuration that owns them.
    configuration: str
    bytes: Mapping[str, int]


class ReservationState(StrEnum):
    """Where a reservation stands."""

    #: Granted. No process may touch the bytes yet.
    HELD = "held"
    #: A process may touch them.
    ACTIVE = "active"
    #: Its lease ran out. It is charged; whether its process lives is not known.
    SUSPECT = "suspect"
    #: Given back, for ever. A ledger holds no such reservation; rows do.
    RELEASED = "released"


class ReservationEvent(StrEnum):
    """What can happen to a reservation."""

    ACTIVATE = "activate"
    RENEW = "renew"
    ADJUST = "adjust"
    DRAIN = "drain"
    EXPIRE = "expire"
    CANCEL = "cancel"
    #: The agent has seen the process dead and the bytes back.
    RELEASE = "release"
    #: The host is declared lost.
    HOST_LOST = "host_lost"


TRANSITIONS: Mapping[tuple[ReservationState, ReservationEvent], ReservationState] = {
    (ReservationState.HELD, ReservationEvent.ACTIVATE): ReservationState.ACTIVE,
    # No process was let near the bytes.
    (ReservationState.HELD, ReservationEvent.EXPIRE): ReservationState.RELEASED,
    (ReservationState.HELD, ReservationEvent.CANCEL): ReservationState.RELEASED,
    (ReservationState.HELD, ReservationEvent.RELEASE): ReservationState.RELEASED,
    (ReservationState.HELD, ReservationEvent.HOST_LOST): ReservationState.RELEASED,
    (ReservationState.ACTIVE, ReservationEvent.RENEW): ReservationState.ACTIVE,
    (ReservationState.ACTIVE, ReservationEvent.ADJUST): ReservationState.ACTIVE,
    (ReservationState.ACTIVE, ReservationEvent.DRAIN): ReservationState.ACTIVE,
    (ReservationState.ACTIVE, ReservationEvent.EXPIRE): ReservationState.SUSPECT,
    (ReservationState.ACTIVE, ReservationEvent.RELEASE): ReservationState.RELEASED,
    (ReservationState.ACTIVE, ReservationEvent.HOST_LOST): ReservationState.RELEASED,
    # A holder that turns out to live goes on: its bytes were given to nobody.
    (ReservationState.SUSPECT, ReservationEvent.RENEW): ReservationState.ACTIVE,
    (ReservationState.SUSPECT, ReservationEvent.DRAIN): ReservationState.SUSPECT,
    (ReservationState.SUSPECT, ReservationEvent.EXPIRE): ReservationState.SUSPECT,
    (ReservationState.SUSPECT, ReservationEvent.RELEASE): ReservationState.RELEASED,
    (ReservationState.SUSPECT, ReservationEvent.HOST_LOST): ReservationState.RELEASED,
}


@dataclass(frozen=True, slots=True)
class DeviceCapacity:
    """What may be granted of a device."""

    host: str
    #: Bytes that reservations may come to in all.
    capacity: int
    #: Whether anything may be granted on it now.
    open: bool = True


@dataclass(frozen=True, slots=True)
class Quota:
    """What reservations on behalf of a namespace may come to."""

    #: Bytes on all devices together; None: no limit.
    max_bytes: int | None = None
    held_bytes: int = 0
    #: Set when its device seconds are used up; says until when.
    exhausted_until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Reservation:
    """A claim that was granted."""

    id: str
    #: Rises with each grant of the ledger.
    epoch: int
    #: Rises with each adjustment.
    revision: int
    state: ReservationState
    host: str
    configuration: str
    #: By id of the device.
    bytes: Mapping[str, int]
    lease_until: datetime
    #: By id of a victim, what it promises of each device.
    backing: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    #: It takes no more work and will end: it may back others.
    draining: bool = False
    #: It is never stopped to make room.
    pinned: bool = False
    namespace: str = ""

    @property
    def total_bytes(self) -> int:
        """Bytes on all devices together."""
        return sum(self.bytes.values())

    def charge(self, device: str) -> int:
        """Bytes of the device that it is charged with: what no victim covers."""
        return self.bytes.get(device, 0) - sum(part.get(device, 0) for part in self.backing.values())


@dataclass(frozen=True, slots=True)
class ReservationRequest:
    """Bytes that are wanted."""

    id: str
    epoch: int
    host: str
    configuration: str
    bytes: Mapping[str, int]
    #: An agent that has not taken it by then will not: it is given back.
    lease_until: datetime
    #: Ids of reservations whose bytes it gets when they are gone. Those that are gone already may still be named.
    after: frozenset[str] = frozenset()
    pinned: bool = False
    namespace: str = ""


@dataclass(frozen=True, slots=True)
class ReservationRefused:
    """Why nothing was granted. Nothing has changed."""

    reason: str


@dataclass(frozen=True, slots=True)
class Ledger:
    """
    Devices and what is reserved of them.

    It may be a part of the whole: some devices, and every reservation that touches one of them.
    """

    devices: Mapping[str, DeviceCapacity] = field(default_factory=dict)
    #: By host, the epoch of the agent that speaks for it.
    agents: Mapping[str, int] = field(default_factory=dict)
    reservations: Mapping[str, Reservation] = field(default_factory=dict)
    #: Bytes that configurations own before they are loaded.
    reserves: Mapping[str, ReservedCapacity] = field(default_factory=dict)
    #: By namespace; one that is not here has no limit.
    quotas: Mapping[str, Quota] = field(default_factory=dict)

    def charged(self, device: str) -> int:
        """Bytes of the device that are charged to reservations."""
        return sum(one.charge(device) for one in self.reservations.values())

    def free(self, device: str) -> int:
        """Bytes of the device that may still be granted."""
        return self.devices[device].capacity - self.charged(device)

    def non_preemptible(self, device: str) -> int:
        """
        Bytes of the device that no preemption brings back: what is set aside, and pinned pools.

        A pinned pool lies in what is set aside for its own configuration, as far as that reaches.
        """
        reserved: defaultdict[str, int] = defaultdict(int)
        pinned: defaultdict[str, int] = defaultdict(int)
        for reserve in self.reserves.values():
            reserved[reserve.configuration] += reserve.bytes.get(device, 0)
        for one in self.reservations.values():
            if one.pinned:
                pinned[one.configuration] += one.bytes.get(device, 0)
        return sum(max(reserved[key], pinned[key]) for key in reserved.keys() | pinned.keys())

    def promised(self, victim: str, device: str) -> int:
        """Bytes of the device that go from a victim to others when it is gone."""
        backings = (one.backing.get(victim, {}) for one in self.reservations.values())
        return sum(backing.get(device, 0) for backing in backings)

"""
A reservation: bytes of devices that were granted to a pool. Here are its states, and the values of the ledger.

`TRANSITIONS` is the table of its states; an absent edge is an error. Every change of a state passes through it:
`rules` takes the edges, `session` writes their result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class ReservedCapacity:
    """A reserve: bytes on a set of devices that are guaranteed to a configuration, also while it is not loaded."""

    id: str
    #: Id of the configuration that owns the bytes.
    configuration: str
    bytes: Mapping[str, int]


class ReservationState(StrEnum):
    """The state of a reservation."""

    #: Granted. No process may use the bytes yet.
    HELD = "held"
    #: A process may use the bytes.
    ACTIVE = "active"
    #: Its lease expired. It stays charged, because its process may be alive.
    SUSPECT = "suspect"
    #: Its bytes are free. This state is final; the ledger holds no such reservation, its row remains for a while.
    RELEASED = "released"


class ReservationEvent(StrEnum):
    """What can happen to a reservation."""

    ACTIVATE = "activate"
    RENEW = "renew"
    ADJUST = "adjust"
    DRAIN = "drain"
    EXPIRE = "expire"
    CANCEL = "cancel"
    #: The agent saw the process dead and its memory free.
    RELEASE = "release"
    #: Its host was declared lost.
    HOST_LOST = "host_lost"


TRANSITIONS: Mapping[tuple[ReservationState, ReservationEvent], ReservationState] = {
    (ReservationState.HELD, ReservationEvent.ACTIVATE): ReservationState.ACTIVE,
    # No process could use the bytes.
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
    # The holder is alive after all: its bytes were never granted to another.
    (ReservationState.SUSPECT, ReservationEvent.RENEW): ReservationState.ACTIVE,
    (ReservationState.SUSPECT, ReservationEvent.DRAIN): ReservationState.SUSPECT,
    (ReservationState.SUSPECT, ReservationEvent.EXPIRE): ReservationState.SUSPECT,
    (ReservationState.SUSPECT, ReservationEvent.RELEASE): ReservationState.RELEASED,
    (ReservationState.SUSPECT, ReservationEvent.HOST_LOST): ReservationState.RELEASED,
}


@dataclass(frozen=True, slots=True)
class DeviceCapacity:
    """The capacity of a device that may be granted."""

    host: str
    #: Most bytes that all reservations together may have.
    capacity: int
    #: False while nothing may be granted on it.
    open: bool = True


@dataclass(frozen=True, slots=True)
class Quota:
    """The limits of the reservations of a namespace, and their use."""

    #: Most bytes on all devices together; None: no limit.
    max_bytes: int | None = None
    held_bytes: int = 0
    #: Set when its device time is used up: until when.
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
    #: Bytes that victims promise to it: by id of the victim, by id of the device.
    backing: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    #: It takes no more work and will end: it may back other claims.
    draining: bool = False
    #: It is never preempted.
    pinned: bool = False
    namespace: str = ""

    @property
    def total_bytes(self) -> int:
        """Its bytes on all devices together."""
        return sum(self.bytes.values())

    def charge(self, device: str) -> int:
        """Return the bytes of a device that are charged to it: those that no victim covers."""
        return self.bytes.get(device, 0) - sum(part.get(device, 0) for part in self.backing.values())


@dataclass(frozen=True, slots=True)
class ReservationRequest:
    """A claim: bytes on devices of a host."""

    id: str
    epoch: int
    host: str
    configuration: str
    bytes: Mapping[str, int]
    #: If no agent has activated it by then, it is released.
    lease_until: datetime
    #: Ids of reservations whose bytes pass to it when they are released. Released ones may still be named.
    after: frozenset[str] = frozenset()
    pinned: bool = False
    namespace: str = ""


@dataclass(frozen=True, slots=True)
class ReservationRefused:
    """The reason why a claim or a change was refused. The ledger did not change."""

    reason: str


@dataclass(frozen=True, slots=True)
class Ledger:
    """
    Devices and their reservations.

    It may be a part of the fleet: some devices, and every reservation on one of them.
    """

    devices: Mapping[str, DeviceCapacity] = field(default_factory=dict)
    #: By host, the epoch of the agent that speaks for it.
    agents: Mapping[str, int] = field(default_factory=dict)
    reservations: Mapping[str, Reservation] = field(default_factory=dict)
    #: Guaranteed capacity of configurations, by id of the reserve.
    reserves: Mapping[str, ReservedCapacity] = field(default_factory=dict)
    #: By namespace; one that is absent has no limit.
    quotas: Mapping[str, Quota] = field(default_factory=dict)

    def charged(self, device: str) -> int:
        """Return the bytes of a device that are charged to reservations."""
        return sum(one.charge(device) for one in self.reservations.values() if device in one.bytes or one.backing)

    def free(self, device: str) -> int:
        """Return the bytes of a device that may still be granted."""
        return self.devices[device].capacity - self.charged(device)

    def non_preemptible(self, device: str) -> int:
        """
        Return the bytes of a device that no preemption can free: reserves and pinned pools.

        A pinned pool uses the reserve of its own configuration first.
        """
        reserved: defaultdict[str, int] = defaultdict(int)
        pinned: defaultdict[str, int] = defaultdict(int)
        for reserve in self.reserves.values():
            reserved[reserve.configuration] += reserve.bytes.get(device, 0)
        for one in self.reservations.values():
            if one.pinned:
                pinned[one.configuration] += one.bytes.get(device, 0)
        return sum(max(reserved[key], pinned[key]) for key in reserved.keys() | pinned.keys())

    def sums(self, some: Collection[str] | None = None) -> dict[str, tuple[int, int]]:
        """Return `charged` and `non_preemptible` of some devices, or of each, in time linear in the ledger."""
        devices = self.devices if some is None else [device for device in self.devices if device in some]
        charged = dict.fromkeys(devices, 0)
        for one in self.reservations.values():
            for device, size in one.bytes.items():
                if device in charged:
                    charged[device] += size
            for part in one.backing.values():
                for device, size in part.items():
                    if device in charged:
                        charged[device] -= size
        fixed = self.non_preemptible_sums()
        return {device: (size, fixed.get(device, 0)) for device, size in charged.items()}

    def non_preemptible_sums(self) -> dict[str, int]:
        """Return `non_preemptible` of each device on which it can be more than 0."""
        reserved: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
        pinned: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
        for reserve in self.reserves.values():
            for device, size in reserve.bytes.items():
                reserved[device][reserve.configuration] += size
        for one in self.reservations.values():
            if one.pinned:
                for device, size in one.bytes.items():
                    pinned[device][one.configuration] += size
        found = {}
        for device in reserved.keys() | pinned.keys():
            kept, fixed = reserved[device], pinned[device]
            found[device] = sum(max(kept[key], fixed[key]) for key in kept.keys() | fixed.keys())
        return found

    def promised(self, victim: str, device: str) -> int:
        """Return the bytes of a device that pass from a victim to other claims when it is released."""
        backings = (one.backing.get(victim, {}) for one in self.reservations.values())
        return sum(backing.get(device, 0) for backing in backings)

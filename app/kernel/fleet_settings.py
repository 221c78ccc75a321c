"""The section `fleet` of the settings: the devices of this host, and how pools are placed on all hosts."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from app.kernel.section import Section
from app.kernel.units import durations
from app.kernel.units.durations import Duration
from app.kernel.units.sizes import Size


class SimulatedDevice(Section):
    """A device that is not there, for trials of a fleet that one does not have. Its name says so in every view."""

    name: str = Field(pattern=r"^sim-[a-z0-9-]{1,28}$", description="sim- and up to 28 lower-case letters, digits, '-'")
    #: Its memory.
    bytes: Size = Field(ge=1024 * 1024, description="a size such as '24GiB', at least 1MiB")
    #: Tokens a second, as a multiple of what the catalogue says of a model.
    speed: float = Field(default=1.0, gt=0, le=1000, description="a number above 0, at most 1000")
    #: Bytes of a model's file that are loaded in a second.
    bandwidth: Size = Field(default=2_000_000_000, ge=1024 * 1024, description="a size such as '2GB', at least 1MiB")


class FleetSettings(Section):
    """The devices of this host, and how pools are placed on all hosts. What concerns all is equal on every host."""

    #: The name of this host in the fleet; empty for its network name. No two hosts share one.
    host: str = Field(default="", max_length=100)
    #: Devices that are not there, for trials; as tables in arriero.toml, as a JSON list in a variable.
    simulated: tuple[SimulatedDevice, ...] = ()
    #: Bytes of this host's RAM that pools may hold in all; 0 takes four fifths of it.
    ram: Size = 0
    #: Bytes of each GPU that stay free whatever is placed on it.
    head_room: Size = 512 * 1024 * 1024
    #: What is desired is compared with what is asked for this often, besides whenever that changes.
    reconcile_every: Annotated[Duration, durations.at_least("100ms")] = timedelta(seconds=1)
    #: Idle pools are moved this often, where that makes room for a model that fits nowhere.
    defragment_every: Annotated[Duration, durations.at_least("1s")] = timedelta(minutes=5)
    #: Agents and pools are heard this often.
    heartbeat: Duration = timedelta(seconds=2)
    #: A pool that could not renew its claim on memory for so long ends itself. Longer than the database may be away.
    lease: Duration = timedelta(minutes=1)
    #: A pool that tells nothing for so long, while its agent reaches the database, is killed by its agent. Longer than
    #: a connection may be silent before it is given up (15 s).
    heartbeat_timeout: Duration = timedelta(seconds=20)
    #: Nothing new is placed on a host whose agent was not heard for so long.
    agent_lease: Duration = timedelta(seconds=10)
    #: A host of which neither agent nor pools were heard for so long is taken for lost.
    host_lost_after: Duration = timedelta(minutes=2)
    #: An agent has so long to begin a pool that was granted.
    begin_within: Annotated[Duration, durations.at_least("1s")] = timedelta(seconds=30)
    #: A pool whose engine has work and makes no progress for so long is killed.
    progress_timeout: Annotated[Duration, durations.at_least("1s")] = timedelta(minutes=2)

    @property
    def host_here(self) -> str:
        """The name of this host in the fleet."""
        return self.host or socket.gethostname()

    @field_validator("heartbeat")
    @classmethod
    def _is_heard_in_time(cls, value: timedelta) -> timedelta:
        if not timedelta(milliseconds=50) <= value <= timedelta(seconds=30):
            raise ValueError("must be from 50ms to 30s")
        return value

    @field_validator("lease", "heartbeat_timeout", "agent_lease")
    @classmethod
    def _outlasts_three_heartbeats(cls, value: timedelta, info: ValidationInfo) -> timedelta:
        heartbeat = info.data.get("heartbeat")
        if heartbeat is not None and value < heartbeat * 3:
            raise ValueError(f"must be at least three times fleet.heartbeat ({durations.show(heartbeat)})")
        return value

    @field_validator("host_lost_after")
    @classmethod
    def _outlasts_the_agent_lease(cls, value: timedelta, info: ValidationInfo) -> timedelta:
        lease = info.data.get("agent_lease")
        if lease is not None and value < lease:
            raise ValueError(f"must be at least fleet.agent_lease ({durations.show(lease)})")
        return value

    @field_validator("simulated")
    @classmethod
    def _have_names_of_their_own(cls, value: tuple[SimulatedDevice, ...]) -> tuple[SimulatedDevice, ...]:
        names = [device.name for device in value]
        if double := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{double!r} is the name of two devices: give each its own")
        return value

"""The section `fleet` of the settings: the devices of this host, and the placement of pools on all hosts."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from app.kernel.sections.section import Section
from app.kernel.units import durations
from app.kernel.units.durations import Duration
from app.kernel.units.sizes import Size

#: Bytes of a software device.
SoftwareBytes = Annotated[Size, Field(ge=1024 * 1024, description="a size such as '1GiB', at least 1MiB")]


class SimulatedDevice(Section):
    """A simulated device, to try out a fleet without its hardware. Every view shows that it is simulated."""

    name: str = Field(pattern=r"^sim-[a-z0-9-]{1,28}$", description="sim- and up to 28 lower-case letters, digits, '-'")
    #: Bytes of its memory.
    bytes: Size = Field(ge=1024 * 1024, description="a size such as '24GiB', at least 1MiB")
    #: Tokens per second, as a multiple of the value in the catalogue entry of a model.
    speed: float = Field(default=1.0, gt=0, le=1000, description="a number above 0, at most 1000")
    #: Bytes of a model's file that are loaded per second.
    bandwidth: Size = Field(default=2_000_000_000, ge=1024 * 1024, description="a size such as '2GB', at least 1MiB")


class FleetSettings(Section):
    """The devices of this host, and the placement of pools on all hosts, whose settings must be equal on every host."""

    #: The unique name of this host in the fleet; empty for its network name.
    host: str = Field(default="", max_length=100)
    #: Simulated devices, as tables in arriero.toml or as a JSON list in a variable.
    simulated: tuple[SimulatedDevice, ...] = ()
    #: Bytes of this host's RAM that all its pools together may use; 0 means four fifths of it.
    ram: Size = 0
    #: Bytes of that RAM that models on GPUs without memory of their own may use (integrated GPUs, Apple's); 0: half.
    unified: Size = 0
    #: Software Vulkan devices, by the bytes of RAM that each may use. They compute on the processor, slower than
    #: llama.cpp itself does: for tests. Without an entry, none is used.
    software: tuple[SoftwareBytes, ...] = Field(default=(), max_length=16)
    #: Bytes of each GPU that are never reserved.
    head_room: Size = 512 * 1024 * 1024
    #: Interval of reconcile passes. A change of the demand starts one in addition.
    reconcile_every: Annotated[Duration, durations.at_least("100ms")] = timedelta(seconds=1)
    #: Interval of defragmentation: idle pools are moved where that makes room for a model that fits on no device.
    defragment_every: Annotated[Duration, durations.at_least("1s")] = timedelta(minutes=5)
    #: Interval of the heartbeats of agents and pools.
    heartbeat: Duration = timedelta(seconds=2)
    #: A pool that could not renew its reservation for this long ends itself. Choose more than a database outage.
    lease: Duration = timedelta(minutes=1)
    #: A pool without a heartbeat for this long is killed by its agent, if the agent reaches the database. Choose more
    #: than 15 s, the time after which a dead connection is given up.
    heartbeat_timeout: Duration = timedelta(seconds=20)
    #: No pool is placed on a host whose agent has sent no heartbeat for this long.
    agent_lease: Duration = timedelta(seconds=10)
    #: A host whose agent and pools have sent no heartbeat for this long is declared lost.
    host_lost_after: Duration = timedelta(minutes=2)
    #: Time within which an agent must start a granted pool.
    begin_within: Annotated[Duration, durations.at_least("1s")] = timedelta(seconds=30)
    #: A pool whose engine has work and makes no progress for this long is killed.
    progress_timeout: Annotated[Duration, durations.at_least("1s")] = timedelta(minutes=2)

    @property
    def host_here(self) -> str:
        """The name of this host in the fleet."""
        return self.host or socket.gethostname()

    @field_validator("heartbeat")
    @classmethod
    def _within_bounds(cls, value: timedelta) -> timedelta:
        if not timedelta(milliseconds=50) <= value <= timedelta(seconds=30):
            raise ValueError("must be from 50ms to 30s")
        return value

    @field_validator("lease", "heartbeat_timeout", "agent_lease")
    @classmethod
    def _at_least_three_heartbeats(cls, value: timedelta, info: ValidationInfo) -> timedelta:
        heartbeat = info.data.get("heartbeat")
        if heartbeat is not None and value < heartbeat * 3:
            raise ValueError(f"must be at least three times fleet.heartbeat ({durations.show(heartbeat)})")
        return value

    @field_validator("host_lost_after")
    @classmethod
    def _at_least_the_agent_lease(cls, value: timedelta, info: ValidationInfo) -> timedelta:
        lease = info.data.get("agent_lease")
        if lease is not None and value < lease:
            raise ValueError(f"must be at least fleet.agent_lease ({durations.show(lease)})")
        return value

    @field_validator("simulated")
    @classmethod
    def _have_unique_names(cls, value: tuple[SimulatedDevice, ...]) -> tuple[SimulatedDevice, ...]:
        names = [device.name for device in value]
        if duplicate := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{duplicate!r} is the name of two devices: names must be unique")
        return value

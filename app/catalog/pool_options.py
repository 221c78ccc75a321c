"""
Pool options of one model: how many pools it has, where, for how long, and the capacity that is reserved for them.

They are the table `[models.pools]` of an entry. `[models.simulated]` defines the simulated engine of the model.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, StrictBool, StrictFloat, StrictInt, model_validator

from app.catalog.source import CatalogTable
from app.kernel.units import durations
from app.kernel.units.durations import Duration
from app.kernel.units.sizes import Size

_Place = Annotated[str, Field(min_length=1, max_length=200)]


def _shown(value: timedelta | str) -> str:
    return value if isinstance(value, str) else durations.show(value)


def _keep_alive(value: Any) -> Any:
    """Parses a duration, or forever; Ollama writes forever as -1."""
    return "forever" if value in ("forever", "-1", -1) else durations.parse(value)


KeepAlive = Annotated[timedelta | Literal["forever"], BeforeValidator(_keep_alive), PlainSerializer(_shown)]


class ReserveOptions(CatalogTable):
    """Memory that is reserved for the model before it is loaded. While it is idle, it is lent to other models."""

    #: The reserve is large enough for pools on at least this many devices.
    devices: StrictInt = Field(default=1, ge=1, le=64, description="a whole number from 1 to 64")
    #: The reserve is large enough for this many requests at the same time.
    slots: StrictInt = Field(default=1, ge=1, le=4096, description="a whole number from 1 to 4096")
    #: Lent memory is returned within this time, by preemption if needed.
    within: Duration = Field(default=timedelta(seconds=10), description="a duration such as '10s'")


class PoolOptions(CatalogTable):
    """The table `[models.pools]` of a catalogue entry."""

    #: Pools that always run, whatever the demand, and the maximum number of pools.
    min: StrictInt = Field(default=0, ge=0, le=64, description="a whole number from 0 to 64")
    max: StrictInt = Field(default=4, ge=1, le=64, description="a whole number from 1 to 64")
    #: A pool that is idle for this time is stopped.
    keep_alive: KeepAlive = Field(default=timedelta(minutes=5), description="a duration such as '5m', or forever")
    #: Pools of the model are never evicted for other models.
    pinned: StrictBool = Field(default=False, description="true or false")
    reserve: ReserveOptions | None = Field(default=None, description="a table such as { devices = 1, slots = 4 }")
    #: Hosts, or ids of devices, on which the model may be placed; empty means all.
    only: tuple[_Place, ...] = Field(default=(), description="a list of names of hosts and ids of devices")
    #: Models with which it never shares a device; its own name keeps its pools on different devices.
    anti_affinity: tuple[_Place, ...] = Field(default=(), description="a list of names of models")
    #: Which of several suitable devices is chosen: the fullest, or the emptiest.
    packing: Literal["binpack", "spread"] = Field(default="binpack", description="binpack or spread")

    @model_validator(mode="after")
    def _check_min_max(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, max is {self.max}: max must be at least min")
        return self


class SimulatedOptions(CatalogTable):
    """The table `[models.simulated]`: what a simulated engine of the model needs on a simulated device."""

    #: Total memory; None means an estimate from the size of the file.
    bytes: Size | None = Field(default=None, ge=1, description="a size such as '6GiB'")
    #: Time to load; None means the time that follows from the bandwidth of the device.
    load: Duration | None = Field(default=None, description="a duration such as '8s'")
    #: Speed of one slot.
    tokens_per_second: Annotated[StrictFloat | StrictInt, Field(gt=0, le=100_000)] = Field(
        default=30.0, description="a number above 0, at most 100000"
    )

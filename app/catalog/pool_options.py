"""
Pooling: what a catalogue says of a model's pools: how many, where, for how long, and what is kept for them.

They are the table `[models.pools]` of an entry; `[models.simulated]` has the numbers of a stand-in for it.
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
    """A duration, or forever; -1 is what that is called elsewhere."""
    return "forever" if value in ("forever", "-1", -1) else durations.parse(value)


KeepAlive = Annotated[timedelta | Literal["forever"], BeforeValidator(_keep_alive), PlainSerializer(_shown)]


class ReserveOptions(CatalogTable):
    """Bytes that the model owns before it is loaded. While they are idle they are lent to others."""

    #: Pools on so many devices at the least.
    devices: StrictInt = Field(default=1, ge=1, le=64, description="a whole number from 1 to 64")
    #: Requests that can be worked on at once.
    slots: StrictInt = Field(default=1, ge=1, le=4096, description="a whole number from 1 to 4096")
    #: Lent bytes come back within that time, by preemption if needed.
    within: Duration = Field(default=timedelta(seconds=10), description="a duration such as '10s'")


class Pooling(CatalogTable):
    """The table `[models.pools]`."""

    #: Pools that are kept up whatever the demand, and the most that there may be.
    min: StrictInt = Field(default=0, ge=0, le=64, description="a whole number from 0 to 64")
    max: StrictInt = Field(default=4, ge=1, le=64, description="a whole number from 1 to 64")
    #: A pool without work for that long is stopped.
    keep_alive: KeepAlive = Field(default=timedelta(minutes=5), description="a duration such as '5m', or forever")
    #: Its pools are never stopped to make room for others.
    pinned: StrictBool = Field(default=False, description="true or false")
    reserve: ReserveOptions | None = Field(default=None, description="a table such as { devices = 1, slots = 4 }")
    #: Hosts, or ids of devices, that are the only ones to take it; empty: all.
    only: tuple[_Place, ...] = Field(default=(), description="a list of names of hosts and ids of devices")
    #: Models beside which it is not placed on a device; its own name keeps its pools apart.
    anti_affinity: tuple[_Place, ...] = Field(default=(), description="a list of names of models")
    #: Which of several fitting devices is taken: the fullest, or the emptiest.
    packing: Literal["binpack", "spread"] = Field(default="binpack", description="binpack or spread")

    @model_validator(mode="after")
    def _min_is_within_max(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, max is {self.max}: give max at least as many as min")
        return self


class Simulated(CatalogTable):
    """The table `[models.simulated]`: what a stand-in for the model takes on a simulated device."""

    #: Memory, all of it; without it, what the size of the file suggests.
    bytes: Size | None = Field(default=None, ge=1, description="a size such as '6GiB'")
    #: Time to load; without it, what the device's bandwidth gives.
    load: Duration | None = Field(default=None, description="a duration such as '8s'")
    #: Of one slot.
    tokens_per_second: Annotated[StrictFloat | StrictInt, Field(gt=0, le=100_000)] = Field(
        default=30.0, description="a number above 0"
    )

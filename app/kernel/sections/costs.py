"""The section of costs: what devices and energy cost, and how budgets count days."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, Field, StringConstraints

from app.kernel.sections.section import CHANGEABLE, Section
from app.kernel.units import durations
from app.kernel.units.durations import Duration

_Price = Annotated[float, Field(ge=0, le=1_000_000, allow_inf_nan=False)]


class DeviceRate(Section):
    """A table `[[costs.devices]]`: what some devices cost while they work."""

    #: A pattern of their id (`host/gpu-0`), their type (`NVIDIA H200`) or their kind; the first that matches holds.
    match: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    #: The price of an hour of a whole device; None: unknown.
    hour: _Price | None = None
    #: The watts of a whole device while it works, where NVML does not measure them; None: unknown.
    watts: _Price | None = None


def _known_zone(value: str) -> str:
    try:
        ZoneInfo(value)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"{value[:60]!r} is no time zone; accepted: names such as 'UTC' and 'Europe/Madrid'") from None
    return value


class CostSettings(Section):
    """What devices and energy cost. Without prices the cost of local work is unknown, which is not nothing."""

    #: The one currency of all prices and budgets, as three letters.
    currency: Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$"), CHANGEABLE] = "USD"
    #: The time zone whose days, weeks and months costs and budgets are counted by.
    timezone: Annotated[str, AfterValidator(_known_zone), CHANGEABLE] = "UTC"
    #: What devices cost: tables `[[costs.devices]]` with `match`, `hour` and `watts`.
    devices: Annotated[tuple[DeviceRate, ...], Field(max_length=200), CHANGEABLE] = ()
    #: The price of a kilowatt-hour; without it energy is not counted.
    kwh: Annotated[_Price | None, CHANGEABLE] = None
    #: Interval at which the costs of attempts are added up, and budgets checked for alerts.
    add_up_every: Annotated[Duration, durations.at_least("1s")] = timedelta(seconds=10)

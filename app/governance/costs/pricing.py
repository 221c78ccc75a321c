"""
The price of an attempt: of its tokens at a server, or of its part of the devices' time and of their energy.

All arithmetic is decimal and exact up to 10⁻¹² of the currency, so many short embeddings add up to a price. What
is not known is None, never 0: a failed call of a server that reported no tokens, a device without a price.

Nothing here reads a clock, a device or a database.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal
from fnmatch import fnmatchcase
from typing import Any

from app.catalog.serving.remote_options import TokenPrices
from app.kernel.sections.costs import CostSettings

#: The least amount that is told apart.
UNIT = Decimal(10) ** -12
_MICROSECONDS_AN_HOUR = Decimal(3_600_000_000)
_WATTS_A_KILOWATT = Decimal(1000)


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """A device of a pool, and how much of it the pool has reserved."""

    #: Such as `host/gpu-0`.
    id: str
    #: Such as `NVIDIA H200`.
    type: str
    kind: str
    #: Bytes that are reserved, and those that the device has for reservations.
    bytes: int
    capacity: int
    #: Measured watts of the whole device; None where nothing measures them.
    watts: Decimal | None = None

    @property
    def part(self) -> Decimal:
        """The part of the device, 0 to 1."""
        return min(Decimal(1), Decimal(self.bytes) / Decimal(self.capacity)) if self.capacity > 0 else Decimal(0)


@dataclass(frozen=True, slots=True)
class Charge:
    """What an attempt cost, and by which prices."""

    #: In the currency of the settings; None where no price is known.
    amount: Decimal | None
    #: The prices that held, as JSON: later prices change nothing of it.
    basis: Mapping[str, Any]


def of_tokens(prices: TokenPrices | None, currency: str, tokens_in: int, tokens_cached: int, tokens_out: int) -> Charge:
    """
    Return the price of tokens of a server. Cached tokens are among those read.

    Without any token nothing is known: a server tells its tokens at the end of an answer only.
    """
    if prices is None:
        return Charge(None, {})
    basis: dict[str, Any] = {
        "currency": currency,
        "per_million": {"in": str(prices.input), "cached": str(prices.cached), "out": str(prices.output)},
    }
    if tokens_in <= 0 and tokens_out <= 0:
        return Charge(None, {**basis, "tokens": "unknown"})
    return Charge(prices.of(tokens_in, tokens_cached, tokens_out).quantize(UNIT, ROUND_HALF_EVEN), basis)


def of_devices(settings: CostSettings, devices: Sequence[DeviceShare], microseconds: int) -> Charge:
    """Return the price of an attempt whose share of the busy time of a pool's devices is so long."""
    basis: dict[str, Any] = {"device_us": microseconds}
    prices = [_rate(settings, device, "hour") for device in devices]
    hours = Decimal(microseconds) / _MICROSECONDS_AN_HOUR
    amount: Decimal | None = None
    if any(price is not None for price in prices):
        hourly = sum(
            (device.part * price for device, price in zip(devices, prices, strict=True) if price is not None),
            Decimal(0),
        )
        amount = hours * hourly
        basis["per_hour"] = _text(hourly)
        unknown = [device.id for device, price in zip(devices, prices, strict=True) if price is None]
        if unknown:
            basis["without_price"] = unknown
    if settings.kwh is not None:
        energy = _energy(settings, devices, hours, basis)
        amount = energy if amount is None else amount + (energy or 0)
    if amount is not None:
        basis["currency"] = settings.currency
        amount = amount.quantize(UNIT, ROUND_HALF_EVEN)
    return Charge(amount, basis)


def _energy(
    settings: CostSettings, devices: Sequence[DeviceShare], hours: Decimal, basis: dict[str, Any]
) -> Decimal | None:
    """Return the price of the energy; None, and a word in the basis, where no power is known."""
    watts, sources, unknown = Decimal(0), set(), []
    for device in devices:
        stated = _rate(settings, device, "watts")
        power = stated if device.watts is None else device.watts
        if power is None:
            unknown.append(device.id)
        else:
            watts += device.part * power
            sources.add("stated" if device.watts is None else "measured")
    if unknown:
        basis["energy_unknown"] = unknown
    if not sources or settings.kwh is None:
        return None
    price = Decimal(str(settings.kwh))
    basis |= {"watts": _text(watts), "watts_are": "+".join(sorted(sources)), "per_kwh": str(price)}
    return hours * watts / _WATTS_A_KILOWATT * price


def _rate(settings: CostSettings, device: DeviceShare, name: str) -> Decimal | None:
    """Return a figure of the first table that matches a device; None where it says nothing."""
    for rate in settings.devices:
        if any(fnmatchcase(one, rate.match) for one in (device.id, device.type, device.kind)):
            value = getattr(rate, name)
            return None if value is None else Decimal(str(value))
    return None


def _text(value: Decimal) -> str:
    return f"{value.quantize(Decimal('0.000001')).normalize():f}"

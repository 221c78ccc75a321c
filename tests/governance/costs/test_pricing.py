"""Prices are exact, and what is not known is never nothing."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.catalog.serving.remote_options import TokenPrices
from app.governance.costs.pricing import DeviceShare, of_devices, of_tokens
from app.kernel.sections.costs import CostSettings, DeviceRate

PRICES = TokenPrices(Decimal("0.15"), Decimal("0.075"), Decimal("0.6"))
GPU = DeviceShare("h/gpu-0", "NVIDIA H200", "gpu", 30, 120)
RAM = DeviceShare("h/ram", "cpu", "ram", 50, 100)
HOUR = 3_600_000_000


def of(rates: dict[str, tuple[float | None, float | None]], kwh: float | None = None) -> CostSettings:
    """Settings with prices of an hour and watts, by patterns."""
    devices = tuple(DeviceRate(match=match, hour=hour, watts=watts) for match, (hour, watts) in rates.items())
    return CostSettings(devices=devices, kwh=kwh)


def test_tokens_are_priced_exactly() -> None:
    charge = of_tokens(PRICES, "EUR", 1_000, 400, 7)
    assert charge.amount == Decimal("0.0001242")  # (600 * .15 + 400 * .075 + 7 * .6) / 10^6
    assert charge.basis == {"currency": "EUR", "per_million": {"in": "0.15", "cached": "0.075", "out": "0.6"}}


def test_a_millionth_of_a_cent_adds_up() -> None:
    one = of_tokens(TokenPrices(Decimal("0.02"), Decimal("0.02"), Decimal(0)), "USD", 1, 0, 0).amount
    assert one is not None
    assert one * 1_000_000 == Decimal("0.02")


def test_without_tokens_or_prices_nothing_is_known() -> None:
    unknown = of_tokens(PRICES, "USD", 0, 0, 0)
    assert (unknown.amount, unknown.basis["tokens"]) == (None, "unknown")
    assert of_tokens(None, "USD", 10, 0, 10).amount is None
    assert of_devices(CostSettings(), [GPU], HOUR).amount is None


def test_a_pool_pays_for_its_part_of_each_device() -> None:
    settings = of({"NVIDIA *": (4.0, None), "ram": (0.1, None), "*": (99, 99)})
    charge = of_devices(settings, [GPU, RAM], HOUR // 2)
    assert charge.amount == Decimal("0.525")  # half an hour of a quarter of 4 and a half of .1
    assert charge.basis == {"device_us": HOUR // 2, "per_hour": "1.05", "currency": "USD"}


def test_the_first_pattern_that_matches_holds() -> None:
    settings = of({"h/gpu-0": (8, None), "gpu": (4, None)})
    assert of_devices(settings, [GPU], HOUR).amount == 2


@pytest.mark.parametrize(("measured", "watts", "source"), [(None, "100", "stated"), (Decimal(700), "175", "measured")])
def test_energy_is_measured_or_stated(measured: Decimal | None, watts: str, source: str) -> None:
    settings = of({"gpu": (None, 400)}, kwh=0.3)
    gpu = DeviceShare(GPU.id, GPU.type, GPU.kind, GPU.bytes, GPU.capacity, measured)
    charge = of_devices(settings, [gpu], HOUR)
    assert charge.amount == Decimal(watts) / 1000 * Decimal("0.3")
    assert (charge.basis["watts"], charge.basis["watts_are"], charge.basis["per_kwh"]) == (watts, source, "0.3")


def test_unknown_power_and_unknown_prices_are_told() -> None:
    settings = of({"gpu": (4, None)}, kwh=0.3)
    charge = of_devices(settings, [GPU, RAM], HOUR)
    assert charge.amount == 1
    assert charge.basis["energy_unknown"] == ["h/gpu-0", "h/ram"]
    assert charge.basis["without_price"] == ["h/ram"]
    alone = of_devices(CostSettings(kwh=0.3), [RAM], HOUR)
    assert (alone.amount, alone.basis["energy_unknown"]) == (None, ["h/ram"])


@given(st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 10**7), st.integers(0, 10**7)), max_size=30))
def test_the_price_of_all_is_the_sum_of_the_prices(calls: list[tuple[int, int, int]]) -> None:
    told = [(i, min(i, c), o) for i, c, o in calls if i or o]
    total = sum((of_tokens(PRICES, "USD", *one).amount or Decimal(0) for one in told), Decimal(0))
    read, cached, written = (sum(one[place] for one in told) for place in range(3))
    assert total == PRICES.of(read, cached, written)

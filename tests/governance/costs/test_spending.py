"""What work would have cost elsewhere, and what that rests on."""

from __future__ import annotations

from decimal import Decimal

from app.catalog.serving.remote_options import TokenPrices
from app.governance.costs.spending import Spending, on_devices, on_server

DONE = Spending(10, 2, 1, 1_000_000, 600_000, 500_000, 0, Decimal(7))


def test_at_a_server_by_its_prices_with_and_without_its_cache() -> None:
    found = on_server(DONE, TokenPrices(Decimal(1), Decimal("0.1"), Decimal(4)))
    assert (found.amount, found.with_cache) == (Decimal(3), Decimal("2.46"))
    assert found.assumed[-1] == "1 of 10 attempts have told no tokens, and count for nothing"
    assert on_server(DONE, TokenPrices(Decimal(1), Decimal(1), Decimal(4))).with_cache is None


def test_on_devices_by_what_a_token_of_the_model_cost() -> None:
    measured = Spending(4, 1, 0, 3_000, 1_000, 2_000, 10, Decimal("0.004"))
    found = on_devices(DONE, measured)
    assert found.amount == Decimal("1.5")  # a millionth for each of 1.5 million tokens
    assert "of 3 attempts" in found.assumed[0]


def test_without_measured_work_nothing_is_known() -> None:
    for measured in (Spending(), Spending(3, 3, 0, 10, 0, 10), Spending(3, 0, 3)):
        found = on_devices(DONE, measured)
        assert found.amount is None
        assert "neither prices" in found.assumed[0]

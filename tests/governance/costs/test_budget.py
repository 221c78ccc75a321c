"""Periods are those of the calendar, and a refusal names the budget and when it begins anew."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.governance.costs.budget import BudgetPeriod, BudgetStanding, SpendingBudget, period_of, refuse
from app.kernel.errors import BudgetUsedUp

MADRID = ZoneInfo("Europe/Madrid")


def test_a_day_in_which_the_clocks_change_is_one_day() -> None:
    begin, end = period_of(BudgetPeriod.DAY, datetime(2026, 3, 29, 12, tzinfo=UTC), MADRID)
    assert (begin.isoformat(), end.isoformat()) == ("2026-03-29T00:00:00+01:00", "2026-03-30T00:00:00+02:00")
    assert end.astimezone(UTC) - begin.astimezone(UTC) == timedelta(hours=23)


def test_weeks_begin_on_mondays_and_months_on_the_first() -> None:
    at = datetime(2026, 12, 31, 23, 30, tzinfo=UTC)  # in Madrid, Friday the first of January
    assert [one.date().isoformat() for one in period_of(BudgetPeriod.WEEK, at, MADRID)] == ["2026-12-28", "2027-01-04"]
    assert [one.date().isoformat() for one in period_of(BudgetPeriod.MONTH, at, MADRID)] == ["2027-01-01", "2027-02-01"]


@given(
    st.integers(946_684_800, 4_102_444_800).map(lambda at: datetime.fromtimestamp(at, UTC)),
    st.sampled_from(BudgetPeriod),
    st.sampled_from(["UTC", "Asia/Kolkata", "Asia/Kathmandu", "America/Santiago", "Pacific/Chatham"]),
)
def test_periods_follow_each_other(at: datetime, period: BudgetPeriod, zone: str) -> None:
    begin, end = (one.astimezone(UTC) for one in period_of(period, at, ZoneInfo(zone)))
    assert begin <= at < end
    # Sums are kept by quarters of an hour, so each period begins with one.
    assert begin.minute % 15 == begin.second == 0
    assert period_of(period, end, ZoneInfo(zone))[0].astimezone(UTC) == end


def standing(spent: str, **given: object) -> BudgetStanding:
    budget = SpendingBudget("a", "monthly", Decimal(10), BudgetPeriod.MONTH, is_hard=True)
    at = datetime(2026, 1, 1, tzinfo=UTC)
    changed = SpendingBudget(**{name: getattr(budget, name) for name in SpendingBudget.__slots__} | given)  # type: ignore[arg-type] # values of its fields
    return BudgetStanding(changed, Decimal(spent), Decimal(1), at, at + timedelta(days=31))


def test_it_is_used_up_when_nothing_is_left() -> None:
    refuse(standing("9.999999999999"), Decimal(0), "interactive", "EUR")
    for spent, reserved in (("10", "0"), ("9", "1")):
        with pytest.raises(
            BudgetUsedUp, match=r"'monthly' of the namespace 'a' .* of 10 EUR .* 2026-02-01T00:00"
        ) as found:
            refuse(standing(spent), Decimal(reserved), "interactive", "EUR")
        assert found.value.budget == "monthly"


def test_soft_budgets_and_spared_work_are_never_refused() -> None:
    refuse(standing("99", is_hard=False), Decimal(0), "batch", "EUR")
    refuse(standing("99", spares_interactive=True), Decimal(0), "interactive", "EUR")
    with pytest.raises(BudgetUsedUp):
        refuse(standing("99", spares_interactive=True), Decimal(0), "batch", "EUR")


def test_a_budget_covers_its_workflow_and_its_model() -> None:
    both = SpendingBudget("a", "b", Decimal(1), BudgetPeriod.DAY, workflow="w", model="m")
    assert both.covers("w", {"m", "n"})
    assert not both.covers("w", {"n"})
    assert not both.covers("v", {"m"})

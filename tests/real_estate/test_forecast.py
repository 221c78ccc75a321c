"""Forecasts: better than the year before, intervals that hold, and series that are hostile."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.kernel.errors import InvalidInput
from app.real_estate import forecast
from benchmarks import real_estate_data


def test_forecasts_of_a_year_are_better_than_the_year_before_and_the_interval_holds() -> None:
    own, naive, inside, months = 0.0, 0.0, 0, 0
    for seed in range(30):
        rows = real_estate_data.prices(seed, 120)
        for ahead, month in enumerate(forecast.forecast(rows[:108], 12)["months"]):
            truth = rows[108 + ahead]["MEDIAN_PRICE"]
            assert month["month"] == rows[108 + ahead]["observation_date"][:7]
            own += abs(month["value"] / truth - 1)
            naive += abs(rows[96 + ahead]["MEDIAN_PRICE"] / truth - 1)
            inside += month["low"] <= truth <= month["high"]
            months += 1
    assert own < 0.7 * naive
    assert 0.7 <= inside / months <= 0.9


def series(months: int, rate: float = 0.0, season: float = 0.0) -> list[dict[str, Any]]:
    return [
        {
            "date": f"{2010 + i // 12}-{i % 12 + 1:02d}-01",
            "value": 100_000 * math.exp(rate * i + season * math.sin(i * math.pi / 6) + 0.001 * (-1) ** i),
        }
        for i in range(months)
    ]


@pytest.mark.parametrize(("rate", "direction"), [(0.01, "rising"), (-0.01, "falling"), (0.0, "flat")])
def test_the_direction_is_that_of_the_last_year(rate: float, direction: str) -> None:
    found = forecast.forecast(series(60, rate), 3)
    assert found["trend"]["direction"] == direction
    assert found["trend"]["year_percent"] == pytest.approx(100 * math.expm1(12 * rate), abs=1.0)


def test_a_season_is_found_where_there_is_one() -> None:
    found = forecast.forecast(series(60, 0.002, 0.05))["seasons"]
    assert (found["present"], found["highest"], found["lowest"]) == (True, "April", "October")
    assert not forecast.forecast(series(60, 0.002))["seasons"]["present"] or found["strength"] > 0.9


def test_missing_months_are_interpolated_and_counted() -> None:
    rows = [row for i, row in enumerate(series(48, 0.01)) if i not in (20, 21, 33)]
    found = forecast.forecast(rows)
    assert found["series"] == {"months": 48, "filled": 3}
    assert found["trend"]["direction"] == "rising"


@pytest.mark.parametrize(
    "rows",
    [
        [],
        "",
        series(23),
        [row for i, row in enumerate(series(48)) if not 20 <= i < 24],
        [{"date": "2020-01-01", "value": math.nan}] * 40,
        [{"date": "0001-01-01", "value": 1}, {"date": "9999-12-01", "value": 1}],
        [{"date": f"{2010 + i // 12}-{i % 12 + 1:02d}", "value": -1} for i in range(40)],
    ],
)
def test_a_series_that_cannot_be_forecast_is_refused(rows: Any) -> None:
    with pytest.raises(InvalidInput) as found:
        forecast.forecast(rows)
    assert found.value.problems[0].where == "series"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(min_value=1e-9, max_value=1e12), min_size=24, max_size=60), st.integers(1, 36))
def test_no_series_gives_nan(values: list[float], horizon: int) -> None:
    rows = [{"date": f"{2000 + i // 12}-{i % 12 + 1:02d}-01", "value": value} for i, value in enumerate(values)]
    found = forecast.forecast(rows, horizon)
    json.loads(json.dumps(found, allow_nan=False))
    assert all(month["low"] <= month["value"] <= month["high"] for month in found["months"])

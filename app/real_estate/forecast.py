"""
The forecast of a monthly price series: damped trend and seasons by exponential smoothing, with an interval.

The model is Holt-Winters with a damped trend (Gardner 1985) on logarithms, ETS(A,Ad,A). Its parameters are the best of
a grid by the one-step errors, and the interval has the variance that the model implies (Hyndman et al. 2008, ch. 6).
A backtest on the table's own last months says how good it is, beside the value of the same month a year before.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from datetime import date
from statistics import NormalDist
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from app.real_estate import table
from app.real_estate.sales import FloatArray
from app.real_estate.table import TableSource

#: Fewest and most months of a series, and most missing months in a row that are interpolated.
MIN_MONTHS, MAX_MONTHS, MAX_GAP = 24, 1_200, 3
_YEAR = 12
_DATE_COLUMNS = ("date", "observation_date", "month", "DATE")
_GRID = np.array(
    list(
        itertools.product(
            (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.95),
            (0.01, 0.05, 0.1, 0.2, 0.4),
            (0.02, 0.1, 0.25, 0.5),
            (0.8, 0.9, 0.95, 0.98),
        )
    )
)
#: Origins of the backtest.
_ORIGINS = 12
#: The change of a year, in percent, from which on prices rise or fall.
_FLAT = 1.0
#: Share of the variance that seasons explain from which on there are seasons.
_SEASONAL = 0.3
_MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)


@dataclass(frozen=True, slots=True)
class Smoothed:
    """A fitted series: where it stands after its last month, in logarithms."""

    alpha: float
    beta: float
    gamma: float
    phi: float
    #: Standard deviation of the one-step errors.
    sigma: float
    level: float
    slope: float
    #: The effects of the coming twelve months.
    season: FloatArray
    #: The level after each month.
    levels: FloatArray


def forecast(
    series: TableSource,
    horizon: Annotated[int, Field(ge=1, le=36)] = 12,
    level: Annotated[float, Field(ge=0.5, le=0.95)] = 0.8,
) -> dict[str, Any]:
    """Forecast the months after a series, whose table has a date and one column of values. Raises InvalidInput."""
    first, values, filled = _read(series)
    logs = np.log(values)
    fitted = smooth(logs)
    last = _month_after(first, len(values) - 1)
    points, deviations = _ahead(fitted, horizon)
    width = NormalDist().inv_cdf((1 + level) / 2)
    months = [
        {
            "month": _month_after(last, ahead + 1).isoformat()[:7],
            "value": _rounded(math.exp(point)),
            "low": _rounded(math.exp(point - width * spread)),
            "high": _rounded(math.exp(point + width * spread)),
        }
        for ahead, (point, spread) in enumerate(zip(points, deviations, strict=True))
    ]
    year = 100 * math.expm1(float(fitted.levels[-1] - fitted.levels[-1 - _YEAR]))
    direction = "rising" if year > _FLAT else "falling" if year < -_FLAT else "flat"
    result = {
        "months": months,
        "level": level,
        "last": {"month": last.isoformat()[:7], "value": _rounded(float(values[-1]))},
        "trend": {"direction": direction, "year_percent": round(year, 1)},
        "seasons": _seasons(logs, first),
        "backtest": _backtest(logs, horizon),
        "series": {"months": len(values), "filled": filled},
    }
    return result | _told(result)


def smooth(logs: FloatArray) -> Smoothed:
    """Fit a series of logarithms of at least MIN_MONTHS months."""
    alpha, beta_of_alpha, gamma, phi = _GRID.T
    beta, gamma = alpha * beta_of_alpha, gamma * (1 - alpha)
    years = min(len(logs) // _YEAR, 4)
    start = logs[: years * _YEAR].reshape(years, _YEAR)
    slope = float(np.mean(np.diff(start.mean(axis=1))) / _YEAR)
    detrended = start - start.mean(axis=1, keepdims=True) - slope * (np.arange(_YEAR) - (_YEAR - 1) / 2)
    level = np.full(len(alpha), float(start[0].mean()) - slope * (_YEAR + 1) / 2)
    trend, season = np.full(len(alpha), slope), np.tile(detrended.mean(axis=0), (len(alpha), 1))
    levels, squares = np.empty((len(logs), len(alpha))), np.zeros(len(alpha))
    for i, value in enumerate(logs):
        place, damped = i % _YEAR, phi * trend
        error = value - (level + damped + season[:, place])
        level, trend = level + damped + alpha * error, damped + beta * error
        season[:, place] += gamma * error
        levels[i] = level
        # The first year is what the start was made from.
        squares += error**2 if i >= _YEAR else 0.0
    best = int(np.argmin(squares))
    sigma = math.sqrt(float(squares[best]) / max(len(logs) - _YEAR - 4, 4))
    coming = np.roll(season[best], -(len(logs) % _YEAR))
    return Smoothed(
        alpha=float(alpha[best]),
        beta=float(beta[best]),
        gamma=float(gamma[best]),
        phi=float(phi[best]),
        sigma=max(sigma, 1e-6),
        level=float(level[best]),
        slope=float(trend[best]),
        season=coming,
        levels=levels[:, best],
    )


def _ahead(fitted: Smoothed, horizon: int) -> tuple[list[float], list[float]]:
    """Return the forecast logarithms of the coming months, and their standard deviations."""
    points, deviations = [], []
    damped, variance = 0.0, 1.0
    for ahead in range(1, horizon + 1):
        damped += fitted.phi**ahead
        points.append(fitted.level + damped * fitted.slope + float(fitted.season[(ahead - 1) % _YEAR]))
        deviations.append(fitted.sigma * math.sqrt(variance))
        effect = fitted.alpha + fitted.beta * damped + (fitted.gamma if ahead % _YEAR == 0 else 0.0)
        variance += effect**2
    return points, deviations


def _backtest(logs: FloatArray, horizon: int) -> dict[str, Any]:
    """Return the mean errors in percent over the last months, beside those of the same month a year before."""
    own, naive = [], []
    steps = min(horizon, _YEAR)
    for origin in range(len(logs) - steps - _ORIGINS + 1, len(logs) - steps + 1):
        if origin < MIN_MONTHS:
            continue
        points, _ = _ahead(smooth(logs[:origin]), steps)
        for ahead, point in enumerate(points):
            own.append(abs(math.expm1(point - float(logs[origin + ahead]))))
            naive.append(abs(math.expm1(float(logs[origin + ahead - _YEAR] - logs[origin + ahead]))))
    if not own:
        return {"forecasts": 0, "error_percent": None, "naive_error_percent": None, "better_than_naive": None}
    error, other = 100 * float(np.mean(own)), 100 * float(np.mean(naive))
    return {
        "forecasts": len(own),
        "error_percent": round(error, 2),
        "naive_error_percent": round(other, 2),
        "better_than_naive": error < other,
    }


def _seasons(logs: FloatArray, first: date) -> dict[str, Any]:
    """Return the mean effect of each month in percent, from the differences to the mean of the year around it."""
    kernel = np.array([0.5, *[1.0] * (_YEAR - 1), 0.5]) / _YEAR
    trend = np.convolve(logs, kernel, mode="valid")
    around = logs[_YEAR // 2 : _YEAR // 2 + len(trend)] - trend
    months = (np.arange(len(around)) + _YEAR // 2 + first.month - 1) % _YEAR
    means = np.array([around[months == month].mean() for month in range(_YEAR)])
    means -= means.mean()
    rest = around - means[months]
    total = float(np.var(around))
    strength = 0.0 if total < 1e-12 else max(0.0, 1.0 - float(np.var(rest)) / total)
    found = strength >= _SEASONAL
    return {
        "present": found,
        "strength": round(strength, 2),
        "percent": {name: round(100 * math.expm1(float(mean)), 1) for name, mean in zip(_MONTHS, means, strict=True)},
        "highest": _MONTHS[int(np.argmax(means))] if found else None,
        "lowest": _MONTHS[int(np.argmin(means))] if found else None,
    }


def _read(series: TableSource) -> tuple[date, FloatArray, int]:
    """Return the first month, a value for each month, and how many of them were interpolated."""
    found: dict[int, float] = {}
    for row in table.read(series, "series"):
        day = next((day for column in _DATE_COLUMNS if (day := table.day(row.get(column))) is not None), None)
        numbers = [table.number(cell) for column, cell in row.items() if column not in _DATE_COLUMNS]
        value = next((one for one in numbers if one is not None), None)
        if day is not None and value is not None and value > 0:
            found[day.year * _YEAR + day.month - 1] = value
    if not found:
        raise table.refused("series", "no row has a date and a number above 0", "columns date and value")
    first, last = min(found), max(found)
    if not MIN_MONTHS <= last - first + 1 <= MAX_MONTHS:
        raise table.refused("series", f"it spans {last - first + 1} months", f"{MIN_MONTHS} to {MAX_MONTHS}")
    gap, known = 0, sorted(found)
    for before, after in itertools.pairwise(known):
        gap = max(gap, after - before - 1)
    if gap > MAX_GAP:
        raise table.refused("series", f"{gap} months in a row are missing", f"at most {MAX_GAP}")
    every = np.arange(first, last + 1)
    values = np.exp(np.interp(every, known, np.log([found[month] for month in known])))
    return date(first // _YEAR, first % _YEAR + 1, 1), values, len(every) - len(known)


def _month_after(month: date, count: int) -> date:
    place = month.year * _YEAR + month.month - 1 + count
    return date(min(place // _YEAR, 9999), place % _YEAR + 1, 1)


def _rounded(value: float) -> float | int:
    """Return a value with five digits."""
    if value <= 0 or not math.isfinite(value):
        return 0
    digits = 4 - math.floor(math.log10(value))
    rounded = round(value, digits)
    return int(rounded) if digits <= 0 or float(rounded).is_integer() else rounded


def _told(result: dict[str, Any]) -> dict[str, Any]:
    """Return the facts as lines, for a model and for the check of its text, and a text that code writes."""
    trend, seasons, end, last = result["trend"], result["seasons"], result["months"][-1], result["last"]
    percent = round(100 * result["level"])
    change = abs(trend["year_percent"])
    moved = {
        "rising": f"Prices rose by {change} % in the last 12 months.",
        "falling": f"Prices fell by {change} % in the last 12 months.",
        "flat": f"Prices were stable in the last 12 months: a change of {trend['year_percent']} %.",
    }[trend["direction"]]
    facts = [f"In {last['month']} the price was {_shown(last['value'])}.", moved]
    if seasons["present"]:
        facts.append(f"Prices are highest in {seasons['highest']} and lowest in {seasons['lowest']}.")
    else:
        facts.append("There is no clear season.")
    facts.append(
        f"The forecast for {end['month']} is {_shown(end['value'])}, with a probability of {percent} % between "
        f"{_shown(end['low'])} and {_shown(end['high'])}."
    )
    return {"facts": facts, "text": " ".join(facts)}


def _shown(value: float) -> str:
    return f"{value:,}"

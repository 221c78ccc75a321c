"""
The value of a home: a hedonic regression and adjusted comparables, with an interval that was tried out on the table.

A comparable's price is adjusted by the effects of the regression to the home and to the day. The estimate is a mean of
the regression and of the adjusted comparables; how much the comparables count is what served the table's own sales
best, each left out. The interval is the spread of those errors (split conformal prediction, Lei et al. 2018).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from app.real_estate import hedonic, table
from app.real_estate.hedonic import Regression
from app.real_estate.sales import FloatArray, Home, Sales, read_home, read_sales
from app.real_estate.table import TableSource

#: Most sales, spread over the table, on which the interval is tried out.
_TRIALS = 400
#: What counts as far, for each way in which homes differ: kilometres, logarithm of the size, years, months, grades.
_SCALES = (2.0, 0.2, 20.0, 9.0, 1.5)
#: The distance of homes whose places are not known, in the same scale: with the same area, and with another one.
_SAME_AREA, _OTHER_AREA = 0.7, 3.0
_EARTH_KM = 6371.0
#: Robust standard deviations from its prediction, above which a sale is no comparable.
_ODD = 4.0
#: Shares of the comparables in the estimate that are tried.
_SHARES = tuple(share / 10 for share in range(11))


@dataclass(frozen=True, slots=True)
class _Coordinates:
    """Where sales or homes are, among all ways in which they differ; a row for each."""

    latitude: FloatArray
    longitude: FloatArray
    areas: Any
    #: Logarithm of the size, year of construction, months before the valuation, grade.
    others: FloatArray


def value(
    sales: TableSource,
    subject: dict[str, Any],
    valued_on: Annotated[str, Field(max_length=40)] = "",
    comparables: Annotated[int, Field(ge=3, le=20)] = 6,
    level: Annotated[float, Field(ge=0.5, le=0.95)] = 0.8,
) -> dict[str, Any]:
    """
    Estimate the price of a home from sold ones. Money is in the currency of the table, sizes in square feet.

    The day is by default that of the last sale. Raises InvalidInput.
    """
    on = table.day(valued_on) if valued_on else None
    if valued_on and on is None:
        raise table.refused("valued_on", f"{valued_on!r} is no day", "a day such as 2014-10-13")
    sold = read_sales(sales, on)
    home = read_home(subject)
    day = on or max(sold.days)
    regression = hedonic.fit(sold, home, day)
    where, own = _coordinates(sold, day), _of_home(home)
    trials = np.unique(np.linspace(0, len(sold) - 1, min(_TRIALS, len(sold))).astype(int))
    odd = _odd(regression)
    local = np.array([_local(regression, where, int(i), comparables, odd) for i in trials])
    own_errors = regression.left_out[trials]
    share = min(_SHARES, key=lambda s: float(np.mean(np.abs(own_errors - s * local))))
    errors = np.sort(own_errors - share * local)
    places, distances, weights = _nearest(where, own, comparables, odd)
    gap = float(weights @ regression.left_out[places])
    middle = regression.prediction + share * gap
    low, high = middle + _quantile(errors, (1 - level) / 2), middle + _quantile(errors, (1 + level) / 2)
    listed = [
        _comparable(sold, regression, int(i), float(distance), float(weight))
        for i, distance, weight in zip(places, distances, weights, strict=True)
    ]
    result = {
        "estimate": _money(middle),
        "low": min(_money(low), _money(middle)),
        "high": max(_money(high), _money(middle)),
        "level": level,
        "valued_on": day.isoformat(),
        "hedonic": {
            "estimate": _money(regression.prediction),
            "explained": round(regression.explained, 3),
            "assumed": list(regression.assumed),
        },
        "adjusted": {"estimate": _money(regression.prediction + gap), "share": share},
        "comparables": listed,
        "sales": {"used": len(sold), "odd": int(odd.sum()), "dropped": dict(sold.dropped)},
        "typical_error": round(float(np.median(np.abs(np.expm1(errors)))), 3),
    }
    return result | _told(result, home)


def _odd(regression: Regression) -> Any:
    """Return a mask of the sales that are no comparables: far from their prediction, as one within a family is."""
    scale = float(np.median(np.abs(regression.left_out))) / 0.6745
    return np.abs(regression.left_out) > _ODD * max(scale, 1e-6)


def _local(regression: Regression, where: _Coordinates, itself: int, count: int, odd: Any) -> float:
    """Return the weighted residual of the sales nearest to a sale, without itself."""
    without = odd.copy()
    without[itself] = True
    places, _, weights = _nearest(where, _row(where, itself), count, without)
    return float(weights @ regression.left_out[places])


def _coordinates(sold: Sales, day: date) -> _Coordinates:
    others = [np.log(sold.size), sold.more["yr_built"], hedonic.months_before(sold.days, day), sold.more["grade"]]
    return _Coordinates(sold.latitude, sold.longitude, np.array(sold.areas), np.column_stack(others))


def _of_home(home: Home) -> _Coordinates:
    others = np.array([[math.log(home.size), home.more["yr_built"], 0.0, home.more["grade"]]])
    return _Coordinates(np.array([home.latitude]), np.array([home.longitude]), np.array([home.area]), others)


def _row(where: _Coordinates, i: int) -> _Coordinates:
    cut = slice(i, i + 1)
    return _Coordinates(where.latitude[cut], where.longitude[cut], where.areas[cut], where.others[cut])


def _nearest(where: _Coordinates, own: _Coordinates, count: int, without: Any) -> tuple[Any, FloatArray, FloatArray]:
    """Return the places of the nearest sales, their distances in kilometres (NaN if unknown), and their weights."""
    kilometres = _kilometres(where, own)
    by_area = np.where((where.areas == own.areas[0]) & (own.areas[0] != ""), _SAME_AREA, _OTHER_AREA)
    squared = np.where(np.isfinite(kilometres), kilometres / _SCALES[0], by_area) ** 2
    differences = (where.others - own.others[0]) / np.array(_SCALES[1:])
    squared += (np.where(np.isfinite(differences), differences, 1.0) ** 2).sum(axis=1)
    squared[without] = np.inf
    places = np.argsort(squared, kind="stable")[:count]
    places = places[np.isfinite(squared[places])]
    weights = 1.0 / (0.25 + squared[places])
    return places, kilometres[places], weights / weights.sum()


def _kilometres(where: _Coordinates, own: _Coordinates) -> FloatArray:
    shrunk = math.cos(math.radians(own.latitude[0])) if math.isfinite(own.latitude[0]) else 1.0
    north = np.radians(where.latitude - own.latitude[0])
    east = np.radians(where.longitude - own.longitude[0]) * shrunk
    distances: FloatArray = _EARTH_KM * np.hypot(north, east)
    return distances


def _comparable(sold: Sales, regression: Regression, i: int, distance: float, weight: float) -> dict[str, Any]:
    changes = {group: regression.home[group] - float(effects[i]) for group, effects in regression.effects.items()}
    price = float(sold.price[i])
    known = {column: _plain(values[i]) for column, values in sold.more.items() if math.isfinite(values[i])}
    return {
        "id": sold.ids[i],
        "price": round(price),
        "date": sold.days[i].isoformat(),
        "sqft_living": round(float(sold.size[i])),
        "zipcode": sold.areas[i],
        "distance_km": round(distance, 2) if math.isfinite(distance) else None,
        "weight": round(weight, 3),
        **known,
        "adjusted_price": _money(math.log(price) + sum(changes.values())),
        "adjustments_percent": {group: round(100 * math.expm1(_tame(change)), 1) for group, change in changes.items()},
    }


def _told(result: Mapping[str, Any], home: Home) -> dict[str, Any]:
    """Return the facts as lines, for a model and for the check of its text, and a text that code writes."""
    percent = round(100 * result["level"])
    facts = [
        (
            f"Estimate: {result['estimate']:,}. With a probability of {percent} % between {result['low']:,} and "
            f"{result['high']:,}, on {result['valued_on']}."
        ),
        f"Home: {home.size:,.0f} sqft" + (f", zip code {home.area}" if home.area else "") + ".",
    ]
    for one in result["comparables"]:
        away = "" if one["distance_km"] is None else f", {one['distance_km']} km away"
        facts.append(
            f"[{one['id']}] sold for {one['price']:,} on {one['date']}, {one['sqft_living']:,} sqft{away}, "
            f"adjusted to {one['adjusted_price']:,}."
        )
    best = result["comparables"][:3]
    named = ", ".join(f"[{one['id']}] ({one['adjusted_price']:,})" for one in best)
    text = (
        f"The home is worth about {result['estimate']:,}, with a probability of {percent} % between {result['low']:,} "
        f"and {result['high']:,}. The closest sales, adjusted to this home, are {named}."
    )
    begin = f"The home is worth about {result['estimate']:,}. [{best[0]['id']}] sold for"
    return {"facts": facts, "text": text, "begin": begin, "cite": [one["id"] for one in result["comparables"]]}


def _quantile(errors: FloatArray, at: float) -> float:
    """Return the quantile of sorted errors of a conformal interval: a little wider than that of the sample."""
    n = len(errors)
    place = math.ceil((n + 1) * at) if at > 0.5 else math.floor((n + 1) * at)
    return float(errors[min(max(place, 1), n) - 1])


def _money(logarithm: float) -> int:
    """Return an amount, rounded to three or four digits as a price is."""
    amount = math.exp(_tame(logarithm))
    step = int(10 ** max(0, math.floor(math.log10(max(amount, 1.0))) - 3))
    return round(amount / step) * step


def _tame(logarithm: float) -> float:
    return min(max(logarithm, -40.0), 40.0)


def _plain(number: float) -> float | int:
    return int(number) if float(number).is_integer() else round(float(number), 3)

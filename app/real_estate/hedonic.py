"""
The hedonic regression: what the price of a home owes to its size, age, quality, place and day of sale.

The logarithm of the price is a sum of effects (Rosen 1974), fitted by ridge regression with Huber's weights, so that
single wrong rows pull little. Areas (`zipcode`) have effects that shrink towards zero where sales are few.
A missing number is replaced by the median of its column, and the names of such columns are reported for the home.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date

import numpy as np

from app.real_estate.sales import FloatArray, Home, Sales

#: Most areas with an effect of their own: those with the most sales.
MAX_AREAS = 300
#: Ridge penalties, in sales: of the effects of columns, and of those of areas.
_PENALTY, _AREA_PENALTY = 0.5, 3.0
#: Rounds of reweighting, and residuals (in scales) from which on the weight falls (Huber 1964).
_ROUNDS, _HUBER = 6, 1.5
#: Least share of sales that know a column for it to be used.
_KNOWN = 0.6
#: Days of a month.
_MONTH = 30.4375


@dataclass(frozen=True, slots=True)
class Regression:
    """A fitted regression of the logarithm of prices."""

    #: Residuals of the sales, each as if its sale had not been fitted (by its leverage).
    left_out: FloatArray
    #: The effects of each sale by group, in logarithms; centred, except that their differences count.
    effects: Mapping[str, FloatArray]
    #: The same of the home.
    home: Mapping[str, float]
    #: The predicted logarithm of the home's price.
    prediction: float
    #: Columns of the home that are not known, and were taken as the median.
    assumed: Sequence[str]
    #: Share of the variance of the logarithms that is explained, with sales left out.
    explained: float


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    group: str
    values: FloatArray
    home: float
    penalty: float


def fit(sales: Sales, home: Home, valued_on: date) -> Regression:
    """Fit the regression, and predict the home on a day."""
    columns, assumed = _columns(sales, home, valued_on)
    matrix = np.column_stack([np.ones(len(sales)), *(column.values for column in columns)])
    row = np.array([1.0, *(column.home for column in columns)])
    penalties = np.array([0.0, *(column.penalty for column in columns)])
    target = np.log(sales.price)
    weights = np.ones(len(sales))
    coefficients = np.zeros(matrix.shape[1])
    for _ in range(_ROUNDS):
        weighted = matrix * weights[:, None]
        inverse = np.linalg.pinv(matrix.T @ weighted + np.diag(penalties) + 1e-9 * np.eye(len(penalties)))
        coefficients = inverse @ (weighted.T @ target)
        residuals = target - matrix @ coefficients
        scale = max(float(np.median(np.abs(residuals))) / 0.6745, 1e-6)
        weights = np.minimum(1.0, _HUBER * scale / np.maximum(np.abs(residuals), 1e-12))
    leverage = np.clip(np.einsum("ij,jk,ik->i", matrix, inverse, matrix, optimize=True) * weights, 0.0, 0.9)
    left_out = residuals / (1.0 - leverage)
    effects: dict[str, FloatArray] = {}
    of_home: dict[str, float] = {}
    for column, coefficient in zip(columns, coefficients[1:], strict=True):
        effects[column.group] = effects.get(column.group, np.zeros(len(sales))) + coefficient * column.values
        of_home[column.group] = of_home.get(column.group, 0.0) + float(coefficient) * column.home
    variance = float(np.var(target))
    explained = 0.0 if variance < 1e-12 else max(0.0, 1.0 - float(np.mean(left_out**2)) / variance)
    return Regression(left_out, effects, of_home, float(row @ coefficients), assumed, explained)


def months_before(days: Sequence[date], valued_on: date) -> FloatArray:
    """Return how many months before a day each of the days is."""
    return np.array([(valued_on - one).days / _MONTH for one in days])


def _columns(sales: Sales, home: Home, valued_on: date) -> tuple[list[_Column], list[str]]:
    raw: list[tuple[str, str, FloatArray, float]] = [
        ("sqft_living", "size", np.log(sales.size), float(np.log(home.size))),
        ("date", "date", months_before(sales.days, valued_on), 0.0),
        ("sqft_lot", "size", np.log(sales.more["sqft_lot"]), float(np.log(home.more["sqft_lot"]))),
    ]
    years = np.array([one.year for one in sales.days], dtype=float)
    age, own_age = np.maximum(years - sales.more["yr_built"], 0.0), valued_on.year - home.more["yr_built"]
    raw += [("yr_built", "age", age, own_age), ("yr_built", "age", age**2, own_age**2)]
    groups = {"bedrooms": "rooms", "bathrooms": "rooms", "floors": "rooms", "condition": "quality", "grade": "quality"}
    raw += [
        (name, groups.get(name, "quality"), sales.more[name], home.more[name])
        for name in ("bedrooms", "bathrooms", "floors", "waterfront", "view", "condition", "grade")
    ]
    if np.mean(np.isfinite(sales.latitude)) >= _KNOWN:
        centre = float(np.nanmedian(sales.latitude)), float(np.nanmedian(sales.longitude))
        north, east = sales.latitude - centre[0], sales.longitude - centre[1]
        own = home.latitude - centre[0], home.longitude - centre[1]
        raw += [("lat", "location", north, own[0]), ("long", "location", east, own[1])]
        raw += [("lat", "location", north**2, own[0] ** 2), ("long", "location", east**2, own[1] ** 2)]
        raw += [("lat", "location", north * east, own[0] * own[1])]
    found: list[_Column] = []
    assumed: dict[str, None] = {}
    for name, group, values, own_value in raw:
        known = np.isfinite(values)
        if np.mean(known) < _KNOWN:
            continue
        low, median, high = (float(x) for x in np.percentile(values[known], [0.5, 50, 99.5]))
        cleaned = np.clip(np.where(known, values, median), low, high)
        spread = float(np.std(cleaned))
        if spread < 1e-9:
            continue
        if not np.isfinite(own_value):
            assumed[name] = None
            own_value = median
        own_value = min(max(own_value, low), high)
        middle = float(np.mean(cleaned))
        found.append(_Column(name, group, (cleaned - middle) / spread, (own_value - middle) / spread, _PENALTY))
    return found + _area_columns(sales, home), list(assumed)


def _area_columns(sales: Sales, home: Home) -> list[_Column]:
    counts: dict[str, int] = {}
    for area in sales.areas:
        if area:
            counts[area] = counts.get(area, 0) + 1
    chosen = sorted(counts, key=lambda area: (-counts[area], area))[:MAX_AREAS]
    areas = np.array(sales.areas)
    return [
        _Column("zipcode", "location", (areas == area).astype(float), float(home.area == area), _AREA_PENALTY)
        for area in chosen
        if counts[area] >= 3 and counts[area] < len(sales)
    ]

"""
Sales: the usable rows of a table of sold homes, as arrays, and the home that is to be valued.

The columns are those of the public table of King County's house sales (`kc_house_data`): `id`, `date`, `price`,
`sqft_living`, and, where they are known, `sqft_lot`, `bedrooms`, `bathrooms`, `floors`, `waterfront`, `view`,
`condition`, `grade`, `yr_built`, `zipcode`, `lat`, `long`. A row without price, size or date is dropped and counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import numpy.typing as npt

from app.real_estate import table
from app.real_estate.table import TableRow, TableSource

FloatArray = npt.NDArray[np.float64]

#: Fewest sales from which a value is estimated.
MIN_SALES = 30
#: Columns of numbers that may be missing, with their lowest and highest sound value.
OPTIONAL: Mapping[str, tuple[float, float]] = {
    "sqft_lot": (100, 1e8),
    "bedrooms": (0, 30),
    "bathrooms": (0, 30),
    "floors": (0.5, 200),
    "waterfront": (0, 1),
    "view": (0, 4),
    "condition": (1, 5),
    "grade": (1, 13),
    "yr_built": (1600, 2200),
}
_PRICE, _SIZE = (1_000.0, 1e10), (50.0, 1e6)


@dataclass(frozen=True, slots=True)
class Sales:
    """Sold homes; all arrays have a place for each, and NaN where a number is missing."""

    ids: Sequence[str]
    days: Sequence[date]
    price: FloatArray
    #: Living area in square feet.
    size: FloatArray
    #: Degrees; NaN for both where one is missing.
    latitude: FloatArray
    longitude: FloatArray
    areas: Sequence[str]
    #: The columns of OPTIONAL.
    more: Mapping[str, FloatArray]
    #: Why rows were not used, and how many.
    dropped: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Home:
    """A home to be valued; NaN where a number is not known."""

    size: float
    latitude: float
    longitude: float
    area: str
    more: Mapping[str, float]


def read_sales(source: TableSource, valued_on: date | None) -> Sales:
    """Return the usable sales until a day, the first of those with the same id and day. Raises InvalidInput."""
    kept: list[tuple[str, date, float, float, TableRow]] = []
    dropped: dict[str, int] = {}
    seen: set[tuple[str, date]] = set()
    for index, row in enumerate(table.read(source, "sales")):
        price, size, sold = table.number(row.get("price")), table.number(row.get("sqft_living")), None
        sold = table.day(row.get("date"))
        key = table.name(row.get("id")) or f"row-{index + 1}"
        reason = _refusal(price, size, sold, valued_on)
        if not reason and sold is not None and (key, sold) in seen:
            reason = "the sale is there twice"
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        assert price is not None, "it was looked at"
        assert size is not None, "it was looked at"
        assert sold is not None, "it was looked at"
        seen.add((key, sold))
        kept.append((key, sold, price, size, row))
    if len(kept) < MIN_SALES:
        why = ", ".join(f"{count} rows: {reason}" for reason, count in sorted(dropped.items()))
        message = f"{len(kept)} rows can be used" + (f" ({why})" if why else "")
        raise table.refused("sales", message, f"at least {MIN_SALES} sales with price, sqft_living and date")
    places = [_place(row) for *_, row in kept]
    return Sales(
        _unique([key for key, *_ in kept]),
        [sold for _, sold, *_ in kept],
        np.array([price for _, _, price, *_ in kept]),
        np.array([size for _, _, _, size, _ in kept]),
        np.array([latitude for latitude, _ in places]),
        np.array([longitude for _, longitude in places]),
        [table.name(row.get("zipcode")) for *_, row in kept],
        {column: np.array([_bounded(row, column) for *_, row in kept]) for column in OPTIONAL},
        dropped,
    )


def read_home(subject: Mapping[str, Any]) -> Home:
    """Return the home to be valued. Raises InvalidInput."""
    size = table.number(subject.get("sqft_living"))
    if size is None or not _SIZE[0] <= size <= _SIZE[1]:
        shown = table.name(subject.get("sqft_living")) or "nothing"
        raise table.refused("subject.sqft_living", f"{shown} is no size", f"{_SIZE[0]:g} to {_SIZE[1]:g} square feet")
    latitude, longitude = _place(subject)
    more = {column: _bounded(subject, column) for column in OPTIONAL}
    return Home(size, latitude, longitude, table.name(subject.get("zipcode")), more)


def _refusal(price: float | None, size: float | None, sold: date | None, valued_on: date | None) -> str:
    if price is None or not _PRICE[0] <= price <= _PRICE[1]:
        return "no sound price"
    if size is None or not _SIZE[0] <= size <= _SIZE[1]:
        return "no sound sqft_living"
    if sold is None:
        return "no sound date"
    return "sold after the day of the valuation" if valued_on is not None and sold > valued_on else ""


def _place(row: Mapping[str, Any]) -> tuple[float, float]:
    latitude, longitude = table.number(row.get("lat")), table.number(row.get("long"))
    if latitude is None or longitude is None or abs(latitude) > 90 or abs(longitude) > 180:
        return math.nan, math.nan
    return latitude, longitude


def _bounded(row: Mapping[str, Any], column: str) -> float:
    value, (lowest, highest) = table.number(row.get(column)), OPTIONAL[column]
    return value if value is not None and lowest <= value <= highest else math.nan


def _unique(names: Sequence[str]) -> Sequence[str]:
    """Return names that are unique: a home that was sold twice gets a number at its second sale."""
    counts: dict[str, int] = {}
    found, taken = [], set(names)
    for name in names:
        counts[name] = count = counts.get(name, 0) + 1
        one = name if count == 1 else f"{name}-{count}"
        while count > 1 and one in taken:
            one = f"{one}x"
        taken.add(one)
        found.append(one)
    return found

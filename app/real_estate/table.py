"""
Tables from users: rows as CSV or as a list of objects, with numbers and dates that may be anything.

A table has at most MAX_ROWS rows of MAX_COLUMNS columns; a longer one is refused before it is read.
A cell that is no finite number, or no date, is missing: it never stops the reading of the other rows.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from app.kernel.errors import InvalidInput, Problem

MAX_ROWS, MAX_COLUMNS, MAX_CHARACTERS = 20_000, 60, 4_000_000
#: Largest magnitude of a number in a table.
MAX_NUMBER = 1e12

TableRow = Mapping[str, Any]
#: A table: CSV with a header, or objects.
TableSource = str | list[dict[str, Any]]

_NUMBER = re.compile(r"[-+]?\d{1,15}(?:\.\d{1,15})?(?:[eE][-+]?\d{1,3})?")
_DATE = re.compile(r"(\d{4})-?(\d{2})-?(\d{2})(?![\d])")
_MONTH = re.compile(r"(\d{4})-(\d{2})$")


def refused(where: str, message: str, accepted: str = "") -> InvalidInput:
    """Return the error of an argument that cannot be used."""
    return InvalidInput([Problem(where, message, accepted)], "argument")


def read(source: TableSource, where: str) -> Sequence[TableRow]:
    """Return the rows of a table. Raises InvalidInput."""
    if isinstance(source, str):
        if len(source) > MAX_CHARACTERS:
            raise refused(where, f"the table has {len(source)} characters", f"at most {MAX_CHARACTERS}")
        return _of_csv(source, where)
    if len(source) > MAX_ROWS:
        raise refused(where, f"the table has {len(source)} rows", f"at most {MAX_ROWS}")
    if any(len(row) > MAX_COLUMNS for row in source):
        raise refused(where, "a row has too many columns", f"at most {MAX_COLUMNS}")
    return source


def number(value: Any) -> float | None:
    """Return a finite number of at most MAX_NUMBER, from a number or a text such as `$1,250.50`; else None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        text = value[:60].strip().lstrip("$€£").replace(",", "").strip()
        if not _NUMBER.fullmatch(text):
            return None
        value = float(text)
    if not isinstance(value, int | float) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return float(value) if abs(value) <= MAX_NUMBER else None


def day(value: Any) -> date | None:
    """Return a date from `2014-10-13`, `20141013T000000`, or the month `2014-10` (its first day); else None."""
    if not isinstance(value, str):
        return None
    text = value[:40].strip()
    match = _DATE.match(text) or _MONTH.match(text)
    if match is None:
        return None
    try:
        return date(int(match[1]), int(match[2]), int(match[3]) if match.re is _DATE else 1)
    except ValueError:
        return None


def name(value: Any, most: int = 60) -> str:
    """Return a cell as a short name without line breaks; empty where it is none."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    if isinstance(value, float):
        value = int(value) if math.isfinite(value) and value.is_integer() and abs(value) < MAX_NUMBER else value
    if isinstance(value, int) and abs(value) > 10**18:
        return ""
    return " ".join(str(value).split())[:most]


def _of_csv(text: str, where: str) -> Sequence[TableRow]:
    try:
        reader = csv.reader(io.StringIO(text.replace("\0", "")))
        header = [cell.strip() for cell in next(reader, [])]
        if not header or len(header) > MAX_COLUMNS:
            raise refused(where, f"the header has {len(header)} columns", f"1 to {MAX_COLUMNS}")
        rows: list[TableRow] = []
        for cells in reader:
            if len(rows) == MAX_ROWS:
                raise refused(where, "the table has too many rows", f"at most {MAX_ROWS}")
            if any(cells):
                rows.append(dict(zip(header, cells, strict=False)))
    except csv.Error as error:
        raise refused(where, f"the text is no CSV: {error}", "CSV with a header") from None
    return rows

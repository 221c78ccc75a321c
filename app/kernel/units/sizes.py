"""
Sizes of memory in the formats that people write: `1048576`, `"512MiB"`, `"24 GB"`, `"1.5GiB"`.

A bare number is in bytes. kB, MB, GB and TB are powers of 1000; KiB, MiB, GiB and TiB are powers of 1024.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

#: The accepted formats, for error messages.
ACCEPTED = "bytes as a whole number, or a text such as '512MiB', '24GiB', '80GB'"

_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_TEXT = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")


def parse(value: Any) -> int:
    """
    Return the number of bytes that `value` describes.

    A value is a whole number or a text with a known unit. Raises ValueError for all others, for negative sizes, and for
    1 EiB or more.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        found = _TEXT.fullmatch(value.strip().lower()) if isinstance(value, str) else None
        if found is None or found[2] not in _UNITS:
            raise ValueError(f"{value!r} is not a size: write {ACCEPTED}")
        size = round(float(found[1]) * _UNITS[found[2]]) if "." in found[1] else int(found[1]) * _UNITS[found[2]]
    if not 0 <= size < 2**60:
        raise ValueError(f"{value!r} is not a size between 0 and 1 EiB: write {ACCEPTED}")
    return size


def show(size: int) -> str:
    """Return the shortest text that `parse` reads as exactly this size."""
    for unit, scale in (("TiB", 2**40), ("TB", 10**12), ("GiB", 2**30), ("GB", 10**9), ("MiB", 2**20), ("MB", 10**6)):
        if size and size % scale == 0:
            return f"{size // scale}{unit}"
    return str(size)


def rounded(size: int) -> str:
    """Return a rounded size for people: `92.1 MiB`, `13.42 GiB`."""
    for unit, scale, digits in (("GiB", 2**30, 2), ("MiB", 2**20, 1), ("KiB", 2**10, 1)):
        if abs(size) >= scale:
            return f"{size / scale:,.{digits}f} {unit}"
    return f"{size} B"


#: A pydantic field that accepts the same values as `parse`.
Size = Annotated[
    int,
    BeforeValidator(parse),
    PlainSerializer(show, return_type=str, when_used="json"),
    WithJsonSchema({"type": ["integer", "string"], "description": ACCEPTED, "examples": ["24GiB", 1073741824]}),
]

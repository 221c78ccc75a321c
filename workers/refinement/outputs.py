"""
Outputs of models as values: parsed from texts, written as texts, and compared.

A text may have JSON in a fence, or after some words; the first object or list in it counts.
Two outputs are equal if they are after normalisation: blanks, case and the last punctuation of texts, the form of
numbers, and the order of keys do not count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from app.kernel.errors import InvalidDefinition
from app.workflows.language import json_text
from app.workflows.language.json_text import NotJson

#: Most characters of a text that is parsed.
MAX_TEXT = 400_000

_FENCE = re.compile(r"```[\w+-]{0,20}[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_BLANKS = re.compile(r"\s+")
_END = " .!?;,:\"'`"


class NoValue(ValueError):
    """A text has no JSON value; the message says why."""


def parsed(text: str) -> Any:
    """Return the JSON value of a text. Raises NoValue."""
    if len(text) > MAX_TEXT:
        raise NoValue(f"the text has {len(text)} characters; at most {MAX_TEXT} are parsed")
    inner = fenced(text)
    try:
        return json_text.parse(inner)
    except (NotJson, InvalidDefinition) as error:
        reason = str(error)
    start = min((at for sign in "{[" if (at := inner.find(sign)) >= 0), default=-1)
    end = max(inner.rfind("}"), inner.rfind("]"))
    if 0 <= start < end and (start, end) != (0, len(inner) - 1):
        try:
            return json_text.parse(inner[start : end + 1])
        except (NotJson, InvalidDefinition) as error:
            reason = str(error)
    raise NoValue(f"the answer is not JSON: {reason[:300]}")


def fenced(text: str) -> str:
    """Return the content of the first code fence of a text; without one, the text."""
    found = _FENCE.search(text)
    return (found[1] if found else text).strip()


def written(value: Any) -> str:
    """Return an output as the text that a model would write."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, separators=(", ", ": "))


def normal(value: Any) -> Any:
    """Return a hashable form of a value that is the same for equal ones."""
    if isinstance(value, str):
        text = _BLANKS.sub(" ", value).strip().casefold().strip(_END)
        number = _number(text)
        return ("number", number) if number is not None else ("text", text)
    if isinstance(value, bool) or value is None:
        return ("constant", value)
    if isinstance(value, int | float):
        return ("number", float(value)) if abs(value) < 1e300 else ("text", str(value))
    if isinstance(value, Mapping):
        return ("object", tuple(sorted((str(key), normal(inner)) for key, inner in value.items())))
    if isinstance(value, Sequence):
        return ("list", tuple(normal(inner) for inner in value))
    return ("text", str(value))


def key_of(value: Any, fields: Sequence[str] = ()) -> str:
    """Return a text that is the same for outputs that are equal, or equal in these fields."""
    compared = [field_of(value, field) for field in fields] if fields else value
    return repr(normal(compared))


def field_of(value: Any, path: str) -> Any:
    """Return the field at a path such as `customer.name` or `items.0`; None when there is none."""
    for part in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, Sequence) and not isinstance(value, str) and part.isdecimal() and len(part) < 7:
            value = value[int(part)] if int(part) < len(value) else None
        else:
            return None
    return value


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the texts, numbers and constants of a value, each with its path."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{path}.{i}" if path else str(i))
    else:
        yield path, value


def _number(text: str) -> float | None:
    if not text or len(text) > 40 or not (text[0].isdecimal() or text[0] in "+-."):
        return None
    try:
        found = float(text)
    except ValueError:
        return None
    return found if abs(found) < 1e300 else None

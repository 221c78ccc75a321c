"""
What an entry of the audit log says of a request: a bounded summary, without secrets.

The value of a field whose name says that it is secret is replaced, and so is the password in a URL.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from app.access import keys

#: Most characters of a summary, of one text in it, and of an actor.
MAX_SUMMARY, _MAX_TEXT, MAX_ACTOR = 1_000, 200, 200
#: Most fields or items at each level of a summary, and most levels.
_MAX_ITEMS, _MAX_DEPTH = 20, 4
#: Characters of a text in which passwords are looked for: more than are shown, so that none is cut before its end.
_MAX_LOOKED_AT = _MAX_TEXT + 700
#: Fields whose values are never shown.
_SECRET = re.compile(r"secret|passw|token$|(api|access)[_-]?key|authorization|cookie|credential|private", re.IGNORECASE)
_PASSWORD = re.compile(r"(?P<before>[a-z][a-z0-9+.-]*://[^\s:/@]{0,100}):[^\s@/]{1,500}@", re.IGNORECASE)
_HIDDEN = "***"


def summary_of(body: Any) -> str:
    """Return the summary of plain data, at most `MAX_SUMMARY` characters."""
    if body is None:
        return ""
    text = json.dumps(_shortened(body, _MAX_DEPTH), ensure_ascii=False, default=str, separators=(", ", ": "))
    return storable(text, MAX_SUMMARY)


def storable(text: str, most: int) -> str:
    """Return a text that Postgres can store, cut to a length."""
    clean = text.replace("\x00", "\ufffd").encode(errors="replace").decode()
    return clean if len(clean) <= most else clean[: most - 1] + "…"


def _shortened(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        shown = _PASSWORD.sub(rf"\g<before>:{_HIDDEN}@", keys.without_secrets(value[:_MAX_LOOKED_AT]))
        is_whole = len(shown) <= _MAX_TEXT and len(value) <= _MAX_LOOKED_AT
        return shown if is_whole else f"{shown[:_MAX_TEXT]}… ({len(value)} characters)"
    if isinstance(value, Mapping):
        if depth == 0:
            return f"({len(value)} fields)"
        kept = list(value.items())[:_MAX_ITEMS]
        shown_fields = {
            str(k)[:_MAX_TEXT]: _HIDDEN if _SECRET.search(str(k)) else _shortened(v, depth - 1) for k, v in kept
        }
        return shown_fields | ({"…": f"{len(value) - len(kept)} more"} if len(value) > len(kept) else {})
    if isinstance(value, list | tuple):
        if depth == 0:
            return f"({len(value)} items)"
        items = [_shortened(item, depth - 1) for item in value[:_MAX_ITEMS]]
        return items + ([f"… {len(value) - len(items)} more"] if len(value) > len(items) else [])
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return "(a long number)"
    return value

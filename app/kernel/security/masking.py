"""
Masking: texts and data without the secrets that may stand in them.

A secret is found as it is, and as URLs and JSON write it. What else became of it, such as a hash, is not recognised.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import quote

#: What stands in the place of a secret.
MASK = "***"

#: Characters of a secret at the least: a shorter one would be found in words that have nothing to do with it.
LEAST = 4

#: Characters that URLs and JSON write for one at the most: `%F0%9F%A6%99`, `\\ud83e\\udd99`.
_WIDEST = 12


def masked(text: str, secrets: Collection[str]) -> str:
    """The text with stars in the place of each secret."""
    return _pattern(secrets).sub(MASK, text) if secrets else text


def scrubbed(value: Any, secrets: Collection[str]) -> Any:
    """Plain data with stars in the place of each secret, in all its texts and keys."""
    return _scrubbed(value, _pattern(secrets)) if secrets else value


def holds(text: str, secrets: Collection[str]) -> bool:
    """Whether a secret stands in the text."""
    return bool(secrets) and _pattern(secrets).search(text) is not None


def reach(secrets: Collection[str]) -> int:
    """Characters at the end of a text that was cut, in which the half of a secret may stand."""
    return _WIDEST * max(map(len, secrets), default=0)


def _scrubbed(value: Any, pattern: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return pattern.sub(MASK, value)
    if isinstance(value, Mapping):
        return {_scrubbed(key, pattern): _scrubbed(inner, pattern) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_scrubbed(inner, pattern) for inner in value]
    return value


def _pattern(secrets: Collection[str]) -> re.Pattern[str]:
    """Finds every form of each secret, the longest first: one may hold another."""
    longest_first = sorted(set(secrets), key=len, reverse=True)
    return re.compile("|".join("".join(map(_forms, secret)) for secret in longest_first))


def _forms(character: str) -> str:
    """A pattern for the ways in which a character is written, the longest first: `%25` is a `%` before it is more."""
    percent = "".join(f"%{byte:02X}" for byte in character.encode())
    forms = {character, quote(character), json.dumps(character)[1:-1], f"\\u{ord(character):04x}"}
    forms |= {"+"} if character == " " else {"\\/"} if character == "/" else set()
    ways = [re.escape(form) for form in sorted(forms, key=len, reverse=True)]
    return f"(?:{'|'.join([f'(?i:{percent})', *ways])})"

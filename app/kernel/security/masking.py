"""
Masking: replaces secrets in texts and data by stars.

A secret is found in plain form and in the encodings of URLs and JSON. Other forms, such as a hash, are not found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import quote

#: The replacement of a secret.
MASK = "***"

#: Fewest characters of a secret: a shorter one would also be found in unrelated words.
MIN_CHARACTERS = 4

#: Most characters that URLs and JSON use for one character: `%F0%9F%A6%99`, `\\ud83e\\udd99`.
_MAX_ENCODED = 12


def masked(text: str, secrets: Collection[str]) -> str:
    """Return the text with each secret replaced by stars."""
    return _pattern(secrets).sub(MASK, text) if secrets else text


def masked_data(value: Any, secrets: Collection[str]) -> Any:
    """Return plain data with each secret replaced by stars, in all its texts and keys."""
    return _masked_data(value, _pattern(secrets)) if secrets else value


def contains_secret(text: str, secrets: Collection[str]) -> bool:
    """Whether the text contains a secret."""
    return bool(secrets) and _pattern(secrets).search(text) is not None


def max_encoded_length(secrets: Collection[str]) -> int:
    """
    Return the most characters that an encoded secret can have.

    So many characters at the end of a cut text may be part of a secret.
    """
    return _MAX_ENCODED * max(map(len, secrets), default=0)


def _masked_data(value: Any, pattern: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return pattern.sub(MASK, value)
    if isinstance(value, Mapping):
        return {_masked_data(key, pattern): _masked_data(inner, pattern) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_masked_data(inner, pattern) for inner in value]
    return value


def _pattern(secrets: Collection[str]) -> re.Pattern[str]:
    """Return a pattern for every form of each secret, the longest secret first: one may contain another."""
    longest_first = sorted(set(secrets), key=len, reverse=True)
    return re.compile("|".join("".join(map(_forms, secret)) for secret in longest_first))


def _forms(character: str) -> str:
    """Return a pattern for all encodings of a character, the longest first: `%25` must match before `%`."""
    percent = "".join(f"%{byte:02X}" for byte in character.encode())
    forms = {character, quote(character), json.dumps(character)[1:-1], f"\\u{ord(character):04x}"}
    forms |= {"+"} if character == " " else {"\\/"} if character == "/" else set()
    patterns = [re.escape(form) for form in sorted(forms, key=len, reverse=True)]
    return f"(?:{'|'.join([f'(?i:{percent})', *patterns])})"

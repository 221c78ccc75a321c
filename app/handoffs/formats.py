"""Formats of fields that JSON Schema lacks, or checks loosely: e-mail addresses, and telephone numbers (E.164)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import phonenumbers

from app.kernel.errors import Problem

#: Most characters of an address (RFC 5321), and of a telephone number with blanks and brackets.
_MAX_ADDRESS, _MAX_NUMBER = 254, 40
_ADDRESS = re.compile(
    r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,64}(?:\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,64}){0,8}"
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,63}"
)


def is_email(text: str) -> bool:
    """Whether this is an e-mail address of a public domain, without quotes or comments."""
    return len(text) <= _MAX_ADDRESS and _ADDRESS.fullmatch(text) is not None


def is_e164(text: str) -> bool:
    """Whether this is a valid telephone number in the form E.164, such as +34600123456."""
    return e164(text) == text


def e164(text: str, region: str | None = None) -> str | None:
    """Return a number in the form E.164; None when it is not valid. `region` is for numbers without a country code."""
    if not text.isascii() or len(text) > _MAX_NUMBER:
        return None
    try:
        number = phonenumbers.parse(text, region)
    except phonenumbers.NumberParseException:
        return None
    if not phonenumbers.is_valid_number(number):
        return None
    return str(phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164))


#: The checked formats of fields, and what is accepted.
CHECKS: Mapping[str, tuple[Callable[[str], bool], str]] = {
    "email": (is_email, "an address such as ana@example.com"),
    "e164": (is_e164, "a valid number such as +34600123456"),
}


def problems(schema: Mapping[str, Any], value: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """Yield the problems of the top-level fields whose format is in `CHECKS`. An empty text is no value."""
    properties = schema.get("properties", {})
    for name, field in properties.items() if isinstance(properties, Mapping) else ():
        found = value.get(name)
        form = field.get("format") if isinstance(field, Mapping) else None
        if isinstance(found, str) and found and isinstance(form, str) and form in CHECKS:
            check, accepted = CHECKS[form]
            if not check(found):
                yield Problem(f"{where}.{name}", f"{found[:60]!r} is not of the format {form}", accepted)

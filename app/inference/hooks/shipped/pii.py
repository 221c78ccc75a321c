"""
The hook `pii`: personal data are replaced by placeholders such as `<EMAIL_1>`, and restored in the result.

Found are e-mail addresses, telephone numbers (of Google's numbering plans), IBANs and credit cards (by their check
digits) and IP addresses. Names and addresses of people are not found: no pattern knows them. Equal values have equal
placeholders, numbered in the order of the prompt, so that a growing conversation keeps its masked beginning. A
placeholder that the prompt itself contains is not used.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import phonenumbers
from pydantic import BaseModel, ConfigDict, Field

from app.inference.hooks.exchange import HookAnswer, HookText, changed
from app.inference.hooks.shipped import scanning
from app.inference.hooks.shipped.scanning import Taken, TimeLimit
from app.kernel.sections.hooks import HookPoint

PiiKind = Literal["iban", "card", "email", "ip", "phone"]

_IBAN = r"\b[A-Za-z]{2}[0-9]{2}(?:[ ]?[A-Za-z0-9]){11,30}"
_CARD = r"[0-9](?:[ \-]?[0-9]){12,40}"
_EMAIL = r"[A-Za-z0-9._%+\-]+@[A-Za-z0-9](?:[A-Za-z0-9.\-]*[A-Za-z0-9])?\.[A-Za-z]{2,24}"
_IP = r"[0-9A-Fa-f]{0,4}(?:[.:]{1,2}[0-9A-Fa-f]{0,4}){2,12}"
_PHONE = r"(?:\+|\(\+?)?[0-9][0-9 ()./\-]{5,22}[0-9]"
#: A placeholder: `_LONGEST` is the most characters of one.
PLACEHOLDER = r"<(?:IBAN|CARD|EMAIL|IP|PHONE)_[0-9]{1,6}>"
_LONGEST = len("<EMAIL_999999>")
#: Most values that one request may have.
_MOST = 100_000


class PiiOptions(BaseModel):
    """What is masked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kinds: tuple[PiiKind, ...] = Field(default=("iban", "card", "email", "ip", "phone"), min_length=1)
    #: The country of telephone numbers without a country code, such as `DE`; without it, these are not found.
    region: str | None = Field(default=None, pattern="^[A-Z]{2}$")
    #: Whether the values come back in the result.
    restore: bool = True


def call(point: HookPoint, texts: list[HookText], options: PiiOptions, state: Any, limit: TimeLimit) -> HookAnswer:
    """Mask the prompt, or restore the result. Raises HookLate."""
    if point is HookPoint.PRE_PROMPT:
        mask = _Mask(options, [one.text for one in texts], limit)
        masked = changed(texts, mask.text)
        if not mask.values:
            return HookAnswer()
        found = {f"masked_{kind}": count for kind, count in mask.counts.items()}
        return HookAnswer(texts=masked, annotations=found, state=mask.values if options.restore else None)
    if not state:
        return HookAnswer()
    values, count = _values(state), 0

    def restored(text: str) -> str:
        nonlocal count
        spans = list(_placeholders(text, values, limit))
        count += len(spans)
        return scanning.replaced(text, spans)

    found_texts = changed(texts, restored)
    return HookAnswer(texts=found_texts, annotations={"restored": count}) if count else HookAnswer()


class StreamRestorer:
    """Restores the pieces of one text: what may be the beginning of a placeholder waits for the next piece."""

    def __init__(self, values: Mapping[str, str]) -> None:
        """`values` are those of the state, by placeholder."""
        self._values, self._held = values, ""

    def feed(self, piece: str) -> str:
        """Return what can be shown now."""
        text, shown = self._held + piece, []
        at = 0
        while True:
            start = text.find("<", at)
            if start < 0:
                shown.append(text[at:])
                self._held = ""
                break
            shown.append(text[at:start])
            end = text.find(">", start, start + _LONGEST)
            if end < 0 and len(text) - start < _LONGEST and text.find("<", start + 1) < 0:
                self._held = text[start:]
                break
            whole = text[start : end + 1] if end >= 0 else ""
            if whole in self._values:
                shown.append(self._values[whole])
                at = end + 1
            else:
                shown.append("<")
                at = start + 1
        return "".join(shown)

    def finish(self) -> str:
        """Return what was held back to the end."""
        held, self._held = self._held, ""
        return held


class _Mask:
    """The masking of one request."""

    def __init__(self, options: PiiOptions, texts: Sequence[str], limit: TimeLimit) -> None:
        self._options, self._limit = options, limit
        #: Placeholders that the prompt contains already.
        self._written = {text[start:end] for text in texts for start, end in scanning.places(PLACEHOLDER, text, limit)}
        self._by_value: dict[tuple[str, str], str] = {}
        self._numbers: dict[str, int] = {}
        self.values: dict[str, str] = {}
        self.counts: dict[str, int] = {}

    def text(self, text: str) -> str:
        """The text, masked."""
        taken, spans = Taken(), list[tuple[int, int, PiiKind]]()
        for kind in self._options.kinds:
            free = taken.merge(list(_FINDERS[kind](text, self._options, self._limit)))
            spans += [(start, end, kind) for start, end in free]
        named = [(start, end, self._placeholder(kind, text[start:end])) for start, end, kind in sorted(spans)]
        return scanning.replaced(text, named)

    def _placeholder(self, kind: PiiKind, value: str) -> str:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        known = self._by_value.get((kind, value))
        if known is not None:
            return known
        if len(self.values) >= _MOST:
            raise ValueError(f"the prompt has more than {_MOST} values to mask")
        while True:
            self._numbers[kind] = self._numbers.get(kind, 0) + 1
            name = f"<{kind.upper()}_{self._numbers[kind]}>"
            if name not in self._written:
                break
        self._by_value[kind, value] = name
        self.values[name] = value
        return name


def _values(state: Any) -> dict[str, str]:
    return {str(name): str(value) for name, value in dict(state).items()}


def _placeholders(text: str, values: Mapping[str, str], limit: TimeLimit) -> Iterator[tuple[int, int, str]]:
    for start, end in scanning.places(PLACEHOLDER, text, limit):
        if (value := values.get(text[start:end])) is not None:
            yield start, end, value


def _ibans(text: str, _: PiiOptions, limit: TimeLimit) -> Iterator[tuple[int, int]]:
    for start, end in scanning.places(_IBAN, text, limit):
        # What follows an IBAN may look like a part of it: the longest beginning that is one counts.
        for last in range(end, start + 14, -1):
            if text[last - 1] != " " and not (last < len(text) and text[last].isalnum()) and _is_iban(text[start:last]):
                yield start, last
                break


def _is_iban(text: str) -> bool:
    code = text.replace(" ", "").upper()
    if not 15 <= len(code) <= 34:
        return False
    digits = "".join(str(int(one, 36)) for one in code[4:] + code[:4])
    return int(digits) % 97 == 1


def _cards(text: str, _: PiiOptions, limit: TimeLimit) -> Iterator[tuple[int, int]]:
    for start, end in scanning.places(_CARD, text, limit):
        if (start and text[start - 1].isalnum()) or (end < len(text) and text[end].isalnum()):
            continue
        # Other groups of digits may stand before and after: whole groups that are a card count.
        edges = [start, *(at + 1 for at in range(start, end) if text[at] in " -")]
        ends = [*(at for at in range(start, end) if text[at] in " -"), end]
        free = start
        for first in edges:
            if first < free:
                continue
            for last in reversed(ends):
                digits = text[first:last].replace(" ", "").replace("-", "")
                if last > first and 13 <= len(digits) <= 19 and _is_card(digits):
                    yield first, last
                    free = last
                    break


def _is_card(digits: str) -> bool:
    """Luhn's check, for the first digits that cards have; a row of zeros is none."""
    if digits[0] not in "23456":
        return False
    doubled = (int(one) * 2 if index % 2 else int(one) for index, one in enumerate(reversed(digits)))
    return sum(one - 9 if one > 9 else one for one in doubled) % 10 == 0


def _emails(text: str, _: PiiOptions, limit: TimeLimit) -> Iterator[tuple[int, int]]:
    yield from scanning.places(_EMAIL, text, limit)


def _ips(text: str, _: PiiOptions, limit: TimeLimit) -> Iterator[tuple[int, int]]:
    for start, end in scanning.places(_IP, text, limit):
        if (start and (text[start - 1].isalnum() or text[start - 1] in "_.:")) or (
            end < len(text) and (text[end].isalnum() or text[end] == "_")
        ):
            continue
        # A full stop or a colon may end the sentence.
        for last in {end, end - 1} if text[end - 1] in ".:" else {end}:
            if _is_ip(text[start:last]):
                yield start, last
                break


def _is_ip(text: str) -> bool:
    if len(text) < 3:  # `::` is written by programmers
        return False
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _phones(text: str, options: PiiOptions, limit: TimeLimit) -> Iterator[tuple[int, int]]:
    for count, (start, end) in enumerate(scanning.places(_PHONE, text, limit)):
        if not count % 64:
            limit.check()
        if (start and text[start - 1].isalnum()) or (end < len(text) and text[end].isalnum()):
            continue
        written = text[start:end]
        plain = "+" + written[2:] if written.startswith("00") else written
        if not plain.lstrip("(").startswith("+") and options.region is None:
            continue
        try:
            number = phonenumbers.parse(plain, options.region)
        except phonenumbers.NumberParseException:
            continue
        if phonenumbers.is_valid_number(number):
            yield start, end


_FINDERS: Mapping[str, Callable[[str, PiiOptions, TimeLimit], Iterator[tuple[int, int]]]] = {
    "iban": _ibans,
    "card": _cards,
    "email": _emails,
    "ip": _ips,
    "phone": _phones,
}

"""
Answers of servers: what is read of them, and what a step keeps.

A body is bounded before and after it is unpacked. What is kept can be stored: JSON as the database takes it, or a text.
The secrets of the call are masked in it, and cookies are left out.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any

from app.kernel.errors import FailureReason, StepFailure
from app.kernel.security import masking
from app.workflows.http.calls import Hop

#: Characters of an answer that are kept with a failure.
KEPT = 4_000
#: The longest delay that a server can ask for.
_LONGEST_DELAY = timedelta(days=1)
#: Bytes that packing may add to a short body.
_PACKING = 1_024
#: The charsets of the web; Python knows others, and some of them take long.
_CHARSETS = re.compile(
    r"utf-?8|utf-16(le|be)?|(us-)?ascii|iso-8859-\d+|windows-125\d|shift_jis|euc-(jp|kr)|gbk|gb18030|big5"
)


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """What a server answered, the secrets of the call masked."""

    status: int
    #: Lower-case names; cookies are not among them.
    headers: Mapping[str, str]
    #: The value of a JSON answer (None where it is empty), else the text.
    body: Any

    def output(self) -> dict[str, Any]:
        """The output of the step."""
        return {"status": self.status, "headers": dict(self.headers), "body": self.body}


class AnswerReader:
    """Unpacks a body while it comes, and stops where it grows too long."""

    def __init__(self, limit: int) -> None:
        self._limit, self._room = limit, limit
        self._unpacker: Any = None
        self._came = 0
        self._parts: list[bytes] = []

    def begin(self, encoding: str) -> None:
        """Know how it is packed. Raises StepFailure for a way that was not asked for."""
        encoding = encoding.strip().lower()
        if encoding in ("gzip", "x-gzip"):
            self._unpacker = _gunzip()
        elif encoding not in ("", "identity"):
            raise _unusable(f"the answer is packed as {encoding[:40]!r}, which was not asked for")

    def take(self, data: bytes) -> None:
        """Take what came. Raises StepFailure when the body is too long or broken."""
        if self._unpacker is None:
            self._keep(data)
            return
        self._came += len(data)
        if self._came > self._limit + _PACKING:
            raise self._too_long()
        try:
            while data:
                if self._unpacker.eof:
                    self._unpacker = _gunzip()
                self._keep(self._unpacker.decompress(data, self._room + 1))
                data = self._unpacker.unused_data if self._unpacker.eof else self._unpacker.unconsumed_tail
        except zlib.error:
            raise _unusable("the answer is no gzip, though it says so") from None

    def end(self) -> None:
        """Nothing more comes. Raises StepFailure when a part is missing."""
        if self._unpacker is not None and self._came and not self._unpacker.eof:
            raise _unusable("the answer's gzip ends too early")

    def body(self) -> bytes:
        """What there is of the body, cut where it grew too long."""
        return b"".join(self._parts)

    def _keep(self, data: bytes) -> None:
        self._parts.append(data[: self._room])
        if len(data) > self._room:
            raise self._too_long()
        self._room -= len(data)

    def _too_long(self) -> StepFailure:
        return _unusable(f"the answer is longer than max_bytes ({self._limit})")


def answer_of(status: int, headers: Sequence[tuple[str, str]], body: bytes, secrets: Collection[str]) -> HttpAnswer:
    """A successful answer. Raises StepFailure for a body that is neither JSON as it says nor text."""
    shown: dict[str, str] = {}
    for name, value in headers:
        if not name.lower().startswith("set-cookie"):
            shown[name.lower()] = f"{shown[name.lower()]}, {value}" if name.lower() in shown else value
    content = Message()
    content["content-type"] = shown.get("content-type", "text/plain")
    kind = content.get_content_type()
    is_json = kind == "application/json" or kind.endswith("+json")
    charset = "utf-8" if is_json else content.get_content_charset("utf-8")
    try:
        text = body.decode(charset if _CHARSETS.fullmatch(charset) else "ascii").removeprefix("\ufeff")
    except (UnicodeDecodeError, LookupError):
        found = f"{kind[:100]}, {len(body)} bytes"
        raise _unusable(f"the answer ({found}) is neither JSON nor a text in {charset[:40]}") from None
    value = _json(text) if is_json else text
    return HttpAnswer(status, masking.masked_data(shown, secrets), masking.masked_data(value, secrets))


def kept(secrets: Collection[str]) -> int:
    """Bytes of a body that are read for a failure: what is kept, and as much as the half of a secret takes."""
    return KEPT + masking.max_encoded_length(secrets)


def failure_of(
    hop: Hop, status: int, headers: Mapping[str, str], body: bytes, secrets: Collection[str], now: datetime
) -> StepFailure:
    """The failure that an unexpected status is. The beginning of the body, which may be cut, is kept with it."""
    reason = FailureReason.HTTP_UNUSABLE
    if status == 429:
        reason = FailureReason.HTTP_THROTTLED
    elif 400 <= status < 500:
        reason = FailureReason.HTTP_4XX
    elif status >= 500:
        reason = FailureReason.HTTP_5XX
    delay = _delay(headers.get("retry-after", ""), now) if status in (429, 503) else None
    # A text of the database holds no zero.
    text = masking.masked(body.decode(errors="replace").replace("\0", "\ufffd"), secrets)
    if len(body) >= kept(secrets):
        text = text[: len(text) - masking.max_encoded_length(secrets)]
    hint = "; follow_redirects would go there" if 300 <= status < 400 and "location" in headers else ""
    return StepFailure(
        reason, f"{hop} answered {status}{hint}", text=text[:KEPT] or None, status=status, retry_after=delay
    )


def _json(text: str) -> Any:
    """The value of a JSON text, such as the database can keep."""
    if not text.strip():
        return None
    try:
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        why = "half a surrogate pair" if isinstance(error, UnicodeEncodeError) else "it cannot be read"
        raise _unusable(f"the answer is no JSON, though it says so: {why}") from None
    return value


def _no_number(text: str) -> Any:
    raise ValueError(text)


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def _delay(text: str, now: datetime) -> timedelta | None:
    """The delay of a header `retry-after`: seconds or a date (RFC 9110, section 10.2.3)."""
    if text.isascii() and text.isdigit():
        return min(timedelta(seconds=int(text[:9])), _LONGEST_DELAY)
    try:
        wanted = parsedate_to_datetime(text) - now
    except (TypeError, ValueError):
        return None
    return min(max(wanted, timedelta(0)), _LONGEST_DELAY)


def _gunzip() -> Any:
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)


def _unusable(message: str) -> StepFailure:
    return StepFailure(FailureReason.HTTP_UNUSABLE, message)

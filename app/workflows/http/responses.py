"""
HTTP responses of servers: reading of bodies, and conversion to the output or the failure of a step.

The size of a body is limited before and after decompression. The output can be stored: JSON that the database accepts,
or a text. The secrets of the call are masked in it, and cookies are left out.
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

#: Maximum characters of a response body that are stored with a failure.
MAX_EXCERPT = 4_000
#: The longest delay that a server can request.
_MAX_DELAY = timedelta(days=1)
#: Bytes that gzip may add to a short body.
_GZIP_OVERHEAD = 1_024
#: The supported charsets. Python has others, some of which are slow to decode.
_CHARSETS = re.compile(
    r"utf-?8|utf-16(le|be)?|(us-)?ascii|iso-8859-\d+|windows-125\d|shift_jis|euc-(jp|kr)|gbk|gb18030|big5"
)


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """A response with the secrets of the call masked."""

    status: int
    #: The names are in lower case; cookies are left out.
    headers: Mapping[str, str]
    #: The value of a JSON response (None when it is empty), otherwise the text.
    body: Any

    def output(self) -> dict[str, Any]:
        """Return the output of the step."""
        return {"status": self.status, "headers": dict(self.headers), "body": self.body}


class ResponseReader:
    """Decompresses a body incrementally, up to a size limit in bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._remaining = limit, limit
        self._decompressor: Any = None
        self._received = 0
        self._parts: list[bytes] = []

    def start(self, encoding: str) -> None:
        """Set the content encoding. Raises StepFailure for an encoding that was not requested."""
        encoding = encoding.strip().lower()
        if encoding in ("gzip", "x-gzip"):
            self._decompressor = _gunzip()
        elif encoding not in ("", "identity"):
            raise _unusable_response(
                f"the response has the content encoding {encoding[:40]!r}; only gzip was requested"
            )

    def feed(self, data: bytes) -> None:
        """Add received bytes. Raises StepFailure when the body is too long or malformed."""
        if self._decompressor is None:
            self._keep(data)
            return
        self._received += len(data)
        if self._received > self._limit + _GZIP_OVERHEAD:
            raise self._too_long()
        try:
            while data:
                if self._decompressor.eof:
                    self._decompressor = _gunzip()
                self._keep(self._decompressor.decompress(data, self._remaining + 1))
                data = self._decompressor.unused_data if self._decompressor.eof else self._decompressor.unconsumed_tail
        except zlib.error:
            raise _unusable_response("the response is declared as gzip, but is not valid gzip") from None

    def close(self) -> None:
        """End the body. Raises StepFailure when it is incomplete."""
        if self._decompressor is not None and self._received and not self._decompressor.eof:
            raise _unusable_response("the gzip data of the response ends too early")

    def body(self) -> bytes:
        """Return the body so far, cut at the limit."""
        return b"".join(self._parts)

    def _keep(self, data: bytes) -> None:
        self._parts.append(data[: self._remaining])
        if len(data) > self._remaining:
            raise self._too_long()
        self._remaining -= len(data)

    def _too_long(self) -> StepFailure:
        return _unusable_response(f"the response is longer than max_bytes ({self._limit})")


def response_of(status: int, headers: Sequence[tuple[str, str]], body: bytes, secrets: Collection[str]) -> HttpResponse:
    """Return a successful response. Raises StepFailure when the body is neither the declared JSON nor a text."""
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
        raise _unusable_response(f"the response ({found}) is neither JSON nor a text in {charset[:40]}") from None
    value = _json(text) if is_json else text
    return HttpResponse(status, masking.masked_data(shown, secrets), masking.masked_data(value, secrets))


def excerpt_bytes(secrets: Collection[str]) -> int:
    """
    Return how many bytes of a body are read for a failure.

    This is the stored excerpt, and in addition enough bytes to recognise a secret at its end.
    """
    return MAX_EXCERPT + masking.max_encoded_length(secrets)


def failure_of(
    hop: Hop, status: int, headers: Mapping[str, str], body: bytes, secrets: Collection[str], now: datetime
) -> StepFailure:
    """Return the failure for an unexpected status, with the beginning of the body, which may be cut."""
    reason = FailureReason.HTTP_UNUSABLE
    if status == 429:
        reason = FailureReason.HTTP_THROTTLED
    elif 400 <= status < 500:
        reason = FailureReason.HTTP_4XX
    elif status >= 500:
        reason = FailureReason.HTTP_5XX
    delay = _delay(headers.get("retry-after", ""), now) if status in (429, 503) else None
    # Postgres cannot store NUL in a text.
    text = masking.masked(body.decode(errors="replace").replace("\0", "\ufffd"), secrets)
    if len(body) >= excerpt_bytes(secrets):
        text = text[: len(text) - masking.max_encoded_length(secrets)]
    hint = "; set follow_redirects to follow the redirect" if 300 <= status < 400 and "location" in headers else ""
    return StepFailure(
        reason, f"{hop} returned {status}{hint}", text=text[:MAX_EXCERPT] or None, status=status, retry_after=delay
    )


def _json(text: str) -> Any:
    """Return the value of a JSON text that the database can store. Raises StepFailure."""
    if not text.strip():
        return None
    try:
        value = json.loads(text, parse_constant=_reject_constant, parse_float=_finite)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        why = "it contains a lone surrogate" if isinstance(error, UnicodeEncodeError) else "it cannot be parsed"
        raise _unusable_response(f"the response is declared as JSON, but is not valid JSON: {why}") from None
    return value


def _reject_constant(text: str) -> Any:
    raise ValueError(text)


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _reject_constant(text)


def _delay(text: str, now: datetime) -> timedelta | None:
    """Return the delay of a `retry-after` header, which is in seconds or a date (RFC 9110, section 10.2.3)."""
    if text.isascii() and text.isdigit():
        return min(timedelta(seconds=int(text[:9])), _MAX_DELAY)
    try:
        wanted = parsedate_to_datetime(text) - now
    except (TypeError, ValueError):
        return None
    return min(max(wanted, timedelta(0)), _MAX_DELAY)


def _gunzip() -> Any:
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)


def _unusable_response(message: str) -> StepFailure:
    return StepFailure(FailureReason.HTTP_UNUSABLE, message)

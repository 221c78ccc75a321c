"""
Refusals of a server: what an HTTP status means for a request.

A refusal of the server itself, its key or its load says that it does not serve now; any other is the request's fault.
"""

from __future__ import annotations

import email.utils
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from app.kernel.errors import FailureReason, StepFailure

#: Most bytes that are read of a refusal, and most characters of it in a message.
MAX_BYTES, _SAID = 64 * 1024, 500
#: Failures that say that the server does not serve.
OF_SERVER = frozenset(
    {
        FailureReason.ENGINE_ERROR,
        FailureReason.TIMEOUT,
        FailureReason.HTTP_THROTTLED,
        FailureReason.HTTP_UNREACHABLE,
        FailureReason.HTTP_REFUSED,
        FailureReason.TEMPLATE_ERROR,
    }
)
#: The longest Retry-After that is believed.
_LONGEST = timedelta(days=1)


def of_answer(status: int, headers: Mapping[str, str], body: str, now: datetime) -> StepFailure:
    """Return the error for an HTTP status of 300 or more; the body must not contain the server's key."""
    said = " ".join(body[:_SAID].split())
    reason, what = _meaning(status, said)
    wait = _retry_after(headers.get("retry-after", ""), now) if status in (429, 503) else None
    return StepFailure(reason, f"{what} ({status}): {said}", status=status, retry_after=wait)


def _meaning(status: int, said: str) -> tuple[FailureReason, str]:
    if status in (400, 413, 422) and "context" in said.lower():
        return FailureReason.CONTEXT_EXCEEDED, "the server rejected the request"
    if status in (408, 504):
        return FailureReason.TIMEOUT, "the server timed out"
    if status == 429:
        return FailureReason.HTTP_THROTTLED, "the server asks for fewer requests"
    if status in (401, 403):
        return FailureReason.ENGINE_ERROR, "the server does not accept the key"
    if status < 400:
        return FailureReason.ENGINE_ERROR, "the server redirects, which is not followed"
    if status == 404 or status >= 500:
        return FailureReason.ENGINE_ERROR, "the server cannot serve the request"
    return FailureReason.INVALID_REQUEST, "the server rejected the request"


def _retry_after(given: str, now: datetime) -> timedelta | None:
    """Return the time of a header Retry-After: seconds, or a date; None when it has neither."""
    given = given.strip()
    if given.isascii() and given.isdigit() and len(given) <= 9:
        return min(timedelta(seconds=int(given)), _LONGEST)
    try:
        at = email.utils.parsedate_to_datetime(given)
    except (ValueError, TypeError):
        return None
    at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    return min(max(at - now, timedelta(0)), _LONGEST)

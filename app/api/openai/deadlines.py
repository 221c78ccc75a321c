"""
The deadline of a call: the time within which a model must begin to work on it.

The header `Prefer: wait=N` (RFC 7240) sets it, in seconds; without it, the setting `api.wait_timeout` does for
interactive calls. A call that has begun has no deadline any more.
A call whose client has set a deadline is refused at once when it is expected to begin later, if the wait is known from
a pool that serves or starts. That pool stays, so a later call finds it.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta

from app.api.openai.errors import DeadlineUnmet
from app.api.openai.road import Waiting
from app.inference.requests import PriorityClass
from app.inference.token_stream import StreamEntry
from app.kernel.errors import InvalidInput, Problem

#: Seconds until another try when the wait is not known, and the most that are told.
_RETRY, _MOST_RETRY = 5, 3_600
#: Most seconds that a client can ask for.
_MOST = 86_400
_WAIT = re.compile(r"(?:^|[,;])\s*wait\s*=\s*\"?([^,;\"]*)\"?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class CallDeadline:
    """The time within which a call must begin."""

    #: Seconds; None for no limit.
    seconds: float | None
    #: The client has set it: its answer gets its status only when the call begins, or cannot.
    is_preferred: bool = False


def deadline_of(prefer: str | None, priority: str, default: timedelta) -> CallDeadline:
    """The deadline of a call from its header `Prefer`. Raises InvalidInput."""
    found = _WAIT.search(prefer or "")
    if found is not None:
        given = found[1].strip()
        if not re.fullmatch(r"\d{1,6}", given) or not 0 < int(given) <= _MOST:
            raise InvalidInput([Problem("Prefer", f"wait={given[:20]}", f"whole seconds from 1 to {_MOST}")], "request")
        return CallDeadline(float(given), is_preferred=True)
    return CallDeadline(default.total_seconds() if priority == PriorityClass.INTERACTIVE and default else None)


async def within(
    deadline: CallDeadline, source: AsyncGenerator[StreamEntry | Waiting]
) -> AsyncGenerator[StreamEntry | Waiting]:
    """The entries of a call. Raises DeadlineUnmet, and stops the call, when it does not begin in time."""
    async with aclosing(source) as entries:
        if deadline.seconds is not None:
            until, waiting = asyncio.get_running_loop().time() + deadline.seconds, None
            while True:
                try:
                    async with asyncio.timeout_at(until):
                        entry = await anext(entries, None)
                except TimeoutError:
                    raise _unmet(deadline.seconds, waiting, "has not begun") from None
                if entry is None:
                    return
                if isinstance(entry, StreamEntry):
                    yield entry
                    break
                waiting = entry
                if deadline.is_preferred and _begins_at(waiting) > until:
                    raise _unmet(deadline.seconds, waiting, "is not expected to begin")
                yield entry
        async for entry in entries:
            yield entry


def _begins_at(waiting: Waiting) -> float:
    """When a call is expected to begin; now, if that is not known."""
    return asyncio.get_running_loop().time() + (waiting.seconds or 0.0)


def _unmet(limit: float, waiting: Waiting | None, what: str) -> DeadlineUnmet:
    detail = f"; {waiting.detail}" if waiting is not None else ""
    seconds = None if waiting is None else waiting.seconds
    retry = _RETRY if seconds is None else min(max(math.ceil(seconds - limit), 1), _MOST_RETRY)
    return DeadlineUnmet(f"the call {what} within {limit:g} s{detail}", retry)

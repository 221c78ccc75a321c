"""
Threads: how many requests, event streams and readiness checks are worked on at once.

Each kind has threads of its own: where the database does not answer, those who ask it hold theirs until the answer
timeout, and nobody else's. What needs no database is asynchronous and needs no thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

#: Requests.
REQUESTS = 16
#: Looks of event streams for what is new.
STREAMS = 4
#: Readiness checks.
READINESS = 1
#: Connections to the database that all of them need.
CONNECTIONS = REQUESTS + STREAMS + READINESS

#: Of an event loop, as anyio keeps its own.
_streams: RunVar[CapacityLimiter] = RunVar("arriero_streams")
_readiness: RunVar[CapacityLimiter] = RunVar("arriero_readiness")

P = ParamSpec("P")
T = TypeVar("T")


def limit_requests() -> None:
    """Endpoints that are no coroutines run on so many threads of this event loop."""
    to_thread.current_default_thread_limiter().total_tokens = REQUESTS


async def of_stream(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function on a thread of the event streams."""
    return await to_thread.run_sync(partial(function, *args, **kwargs), limiter=_limiter(_streams, STREAMS))


async def of_readiness(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function on the thread of the readiness checks."""
    return await to_thread.run_sync(partial(function, *args, **kwargs), limiter=_limiter(_readiness, READINESS))


def _limiter(kept: RunVar[CapacityLimiter], threads: int) -> CapacityLimiter:
    try:
        return kept.get()
    except LookupError:
        kept.set(made := CapacityLimiter(threads))
        return made

"""
Threads: the limits on concurrent requests, event streams, readiness checks and look-ups of API keys.

Each kind has its own threads: when the database does not answer, calls to it block the threads of their own kind until
the answer timeout, and no others. Endpoints without the database are asynchronous and need no thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

#: Threads for requests.
REQUESTS = 16
#: Threads for the polls of event streams.
STREAMS = 4
#: Threads for readiness checks.
READINESS = 1
#: Threads for the look-up of API keys: a flood of unknown ones delays only others that are not known yet.
KEYS = 2
#: Database connections for all threads together.
CONNECTIONS = REQUESTS + STREAMS + READINESS + KEYS

#: One limiter per event loop, as in anyio.
_streams: RunVar[CapacityLimiter] = RunVar("arriero_streams")
_readiness: RunVar[CapacityLimiter] = RunVar("arriero_readiness")
_keys: RunVar[CapacityLimiter] = RunVar("arriero_keys")

P = ParamSpec("P")
T = TypeVar("T")


def limit_requests() -> None:
    """Set the number of threads of this event loop for synchronous endpoints."""
    to_thread.current_default_thread_limiter().total_tokens = REQUESTS


async def run_for_request(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function on a thread for requests."""
    return await to_thread.run_sync(partial(function, *args, **kwargs))


async def run_for_stream(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function on a thread for event streams."""
    return await to_thread.run_sync(partial(function, *args, **kwargs), limiter=_limiter(_streams, STREAMS))


async def run_for_keys(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function on a thread for the look-up of API keys."""
    return await to_thread.run_sync(partial(function, *args, **kwargs), limiter=_limiter(_keys, KEYS))


async def run_for_readiness(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function on a thread for readiness checks."""
    return await to_thread.run_sync(partial(function, *args, **kwargs), limiter=_limiter(_readiness, READINESS))


def _limiter(variable: RunVar[CapacityLimiter], threads: int) -> CapacityLimiter:
    try:
        return variable.get()
    except LookupError:
        variable.set(limiter := CapacityLimiter(threads))
        return limiter

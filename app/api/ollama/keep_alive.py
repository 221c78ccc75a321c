"""
`keep_alive`: for how long a model stays loaded after a request.

A number counts seconds; a text is a duration as Go writes it (`5m`, `1h30m`, `300ms`). 0 unloads the model as soon as
it is idle, a negative value keeps it until its memory is needed.
"""

from __future__ import annotations

import math
import re
from datetime import timedelta
from typing import Annotated, Any

import redis
from pydantic import BeforeValidator

from app.api import threads
from app.api.services import Services
from app.catalog.model import Model
from app.fleet import views
from app.fleet.pool import COMING, PoolState
from app.kernel import log
from app.kernel.errors import BrokerUnreachable
from app.scheduler import residencies
from app.scheduler.residencies import Residency

_log = log.get(__name__)

#: Seconds of each unit of Go's durations.
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(?P<sign>[+-]?)(?P<parts>(?:\d{1,15}(?:\.\d{0,9})?(?:ns|us|µs|ms|s|m|h)){1,8})", re.ASCII)
_PART = re.compile(r"(\d+(?:\.\d*)?)(ns|us|µs|ms|s|m|h)", re.ASCII)
_NUMBER = re.compile(r"[+-]?\d{1,15}(?:\.\d{0,9})?", re.ASCII)
#: Longer times are forever.
_MAX_SECONDS = 10 * 365 * 86_400
#: The time that means forever.
FOREVER = timedelta.max


def parse(value: Any) -> timedelta:
    """Return the time of a value, `FOREVER` for a negative one. Raises ValueError for what is no duration."""
    if isinstance(value, timedelta):
        return value
    seconds = _seconds(value)
    if seconds is None:
        raise ValueError(f"{str(value)[:60]!r} is not a duration; accepted: seconds, or a text such as '5m', '1h30m'")
    return FOREVER if seconds < 0 or seconds > _MAX_SECONDS else timedelta(seconds=seconds)


#: A field of a request.
KeepAliveIn = Annotated[timedelta, BeforeValidator(parse)]


def store(services: Services, model: Model, keep: timedelta) -> None:
    """
    Store for how long a model stays loaded, and make the scheduler look at it.

    It is a wish: a broker that does not answer is logged, and the model's own value holds.
    """
    pools = _coming(services, model)
    if not pools:
        return
    try:
        with services.publisher.connection() as client:
            residencies.store(client, model.name, Residency(None if keep == FOREVER else keep, frozenset(pools)))
    except (BrokerUnreachable, redis.RedisError) as error:
        _log.warning("residency_not_stored", model=model.name, error=str(error))
        return
    services.operator_commands.wake()


async def apply(services: Services, model: Model, keep: timedelta | None) -> None:
    """Store what a request says, if it says anything."""
    if keep is not None:
        await threads.run_for_request(store, services, model, keep)


def _coming(services: Services, model: Model) -> list[str]:
    """The ids of the pools of a model that serve or will serve it; one that drains is none of them."""
    return [pool.id for pool in views.pools(services.database, model=model.name) if pool.state in COMING]


async def is_coming(services: Services, model: Model) -> bool:
    """Whether a pool serves the model or will serve it."""
    return bool(await threads.run_for_request(_coming, services, model))


async def is_loaded(services: Services, model: Model) -> bool:
    """Whether a pool serves the model."""
    pools = await threads.run_for_request(views.pools, services.database, model=model.name)
    return any(pool.state is PoolState.SERVING for pool in pools)


def kept(services: Services) -> frozenset[str]:
    """The models that the settings, the catalogue or an operator keep running, whatever clients say."""
    always = {model.name for model in services.catalog.models if model.pools.min or model.pools.pinned}
    targets = (target.model for target in views.targets(services.database) if target.pools)
    return frozenset({*always, *services.settings.pools.models, *targets})


async def is_kept(services: Services, model: Model) -> bool:
    """Whether something keeps the model running, whatever clients say."""
    return model.name in await threads.run_for_request(kept, services)


def _seconds(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if not isinstance(value, str):
        return float(value) if abs(value) < _MAX_SECONDS * 10 else math.copysign(_MAX_SECONDS * 10, value)
    text = value.strip()
    if len(text) <= 30 and _NUMBER.fullmatch(text):
        return float(text)
    match = _DURATION.fullmatch(text) if len(text) <= 200 else None
    if match is None:
        return None
    total = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(match["parts"]))
    return -total if match["sign"] == "-" else total

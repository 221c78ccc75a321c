"""
Live tokens: how many tokens the steps that run now have written so far. For views only; nothing depends on them.

Each pool writes those of its steps once a second, to one hash in Redis for each run, under its own name. A hash expires
when no pool has written it for some seconds. What a pool that has died has left there is ignored after the same time.
Without Redis there are none.

Redis keys:
    arriero:live-tokens:<run id>    hash: the owner of the leases to the steps that it holds, as JSON
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from app.kernel import log
from app.kernel.broker import CeleryPublisher
from app.kernel.errors import BrokerUnreachable

_log = log.get(__name__)

#: After this time without a write, live tokens are out of date.
LIFE = timedelta(seconds=5)
#: Most characters of what one pool has written that are read, and most steps of a run.
_MAX_LENGTH, _MAX_STEPS = 1_000_000, 10_000


@dataclass(frozen=True, slots=True)
class LiveTokens:
    """The tokens of an attempt so far."""

    attempt: int
    #: Written tokens.
    tokens_out: int
    #: Since its first token; None when that is not known yet.
    tokens_per_s: float | None = None


def key_of(run_id: UUID) -> str:
    """Return the Redis key of the live tokens of a run."""
    return f"arriero:live-tokens:{run_id}"


def write(
    broker: CeleryPublisher,
    owner: str,
    runs: Mapping[UUID, Mapping[str, LiveTokens]],
    left: Iterable[UUID],
    now: datetime,
) -> None:
    """
    Write the live tokens of an owner's steps by run and key, in one round trip; `left` are runs of which it holds none.

    Raises BrokerUnreachable.
    """
    with broker.connection() as redis, redis.pipeline(transaction=False) as pipeline:
        for run_id, steps in runs.items():
            listed = {key: [one.attempt, one.tokens_out, one.tokens_per_s] for key, one in steps.items()}
            pipeline.hset(key_of(run_id), owner, json.dumps([now.timestamp(), listed]))
            pipeline.expire(key_of(run_id), LIFE)
        for run_id in left:
            pipeline.hdel(key_of(run_id), owner)
        pipeline.execute()


def read(broker: CeleryPublisher, run_id: UUID, now: datetime) -> dict[str, LiveTokens]:
    """Return the live tokens of a run, by the keys of its steps and items. Empty without Redis."""
    try:
        with broker.connection() as redis:
            stored: Mapping[bytes, bytes] = redis.hgetall(key_of(run_id))  # type: ignore[assignment] # not a coroutine
    except BrokerUnreachable as error:
        _log.debug("live_tokens_not_read", error=str(error))
        return {}
    found: dict[str, LiveTokens] = {}
    for text in stored.values():
        found |= _parsed(text, now)
        if len(found) > _MAX_STEPS:
            return {}
    return found


def _parsed(text: bytes, now: datetime) -> dict[str, LiveTokens]:
    """Return what one owner has written; empty when it is out of date or malformed: every client of Redis can write."""
    try:
        if len(text) > _MAX_LENGTH:
            return {}
        written_at, listed = json.loads(text)
        if abs(now.timestamp() - written_at) > LIFE.total_seconds():
            return {}
        return {
            str(key): LiveTokens(int(attempt), int(tokens), None if rate is None else float(rate))
            for key, (attempt, tokens, rate) in listed.items()
        }
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}

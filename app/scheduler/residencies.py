"""
Residencies: for how long clients want a model to stay loaded after their last request (`keep_alive` of Ollama's API).

A residency replaces the `keep_alive` of the model's entry in the catalogue. It holds for the pools that were there when
it was stored: once they are gone, the model's own value holds again. Pools with it are evicted like all others.

Redis keys:
    arriero:residencies   hash: by model, an object with the time in seconds (null: forever) and the ids of the pools

It is a hint: with a lost Redis, the values of the catalogue hold again.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import redis

from app.kernel import broker, log

_log = log.get(__name__)

_KEY = "arriero:residencies"
#: Most models that are read.
_MAX_MODELS = 10_000


@dataclass(frozen=True, slots=True)
class Residency:
    """For how long a model stays loaded while it is idle."""

    #: None: forever.
    keep: timedelta | None
    #: Ids of the pools for which it holds.
    pools: frozenset[str]

    def encoded(self) -> str:
        """The value in Redis."""
        seconds = None if self.keep is None else self.keep.total_seconds()
        return json.dumps({"seconds": seconds, "pools": sorted(self.pools)})

    @staticmethod
    def decoded(value: Any) -> Residency:
        """The residency of a value in Redis. Raises ValueError for another form."""
        try:
            content = json.loads(value)
            seconds = content["seconds"]
            keep = None if seconds is None else timedelta(seconds=float(seconds))
            return Residency(keep, frozenset(str(pool) for pool in content["pools"]))
        except (KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"not a residency: {error}") from None


def store(client: redis.Redis, model: str, residency: Residency) -> None:
    """Store the residency of a model of the catalogue. Raises redis.RedisError."""
    client.hset(_KEY, model, residency.encoded())


def remove(client: redis.Redis, model: str) -> None:
    """Let the value of the catalogue hold again. Raises redis.RedisError."""
    client.hdel(_KEY, model)


def read(client: redis.Redis) -> dict[str, Residency]:
    """Return the residencies by model. Raises redis.RedisError."""
    found = {}
    content: Any = client.hgetall(_KEY)
    for name, value in list(content.items())[:_MAX_MODELS]:
        model = name.decode("utf-8", "replace")
        try:
            found[model] = Residency.decoded(value)
        except ValueError as error:
            _log.warning("residency_invalid", model=model, error=str(error))
    return found


class Residencies:
    """The residencies as a control worker sees them. While Redis does not answer, those that it last read hold."""

    def __init__(self, redis_url: str) -> None:
        """Does not connect."""
        self._redis = broker.connect(redis_url)
        self._last: Mapping[str, Residency] = {}

    def current(self, models: Collection[str]) -> Mapping[str, Residency]:
        """Return the residencies of these models. Those of others, which are no more in the catalogue, are deleted."""
        try:
            self._last = read(self._redis)
            if unknown := self._last.keys() - set(models):
                self._redis.hdel(_KEY, *unknown)
        except redis.RedisError as error:
            _log.warning("residencies_not_read", error=str(error))
        return self._last

    def close(self) -> None:
        """Close the connection."""
        self._redis.close()

"""The counters of the response cache, as they are in Redis (`app/inference/cache/store.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import redis

from app.inference.cache.store import COUNTS


def cache_calls(client: redis.Redis) -> Mapping[tuple[str, str, str], int]:
    """Return calls by namespace, model and status. Raises redis.RedisError."""
    found: Any = client.hgetall(COUNTS)
    calls: dict[tuple[str, str, str], int] = {}
    for member, count in found.items():
        namespace, _, rest = member.decode("utf-8", "replace").partition("|")
        model, _, status = rest.rpartition("|")
        if count.isdigit():
            calls[namespace, model, status] = int(count)
    return calls

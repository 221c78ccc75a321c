"""
Probes over Redis: a request for one token to one pool, which answers on a token stream as for any direct request.

Redis keys:
    arriero:probe:<pool id>   list: the probe of a pool (`app/inference/direct.py` builds it)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import redis

from app.catalog.model import Model
from app.governance.probes.probe import ProbeAnswer
from app.inference import direct, token_stream
from app.inference.direct import DirectRequest
from app.inference.requests import PriorityClass
from app.inference.token_stream import EntryKind
from app.kernel.errors import BrokerUnreachable

#: Seconds after which a probe that nobody took is gone.
_KEPT_SECONDS = 60


@dataclass(frozen=True, slots=True)
class ProbedPool:
    """A pool to be probed."""

    id: str
    model: Model


def body_of(model: Model) -> dict[str, Any]:
    """Return a request that costs one token, one vector or one score."""
    if set(model.use_cases) - {"embed", "rerank"}:
        return {"prompt": "Hello", "max_tokens": 1}
    if "embed" in model.use_cases:
        return {"input": ["Hello"]}
    return {"query": "Hello", "documents": ["Hello"]}


def ask(client: redis.Redis, pools: Sequence[ProbedPool], created: int, seconds: float) -> dict[str, ProbeAnswer]:
    """
    Send a probe to each pool, and return the answers that came within `seconds`, by pool.

    Raises BrokerUnreachable.
    """
    try:
        return _ask(client, pools, created, seconds)
    except (redis.RedisError, OSError) as error:
        raise BrokerUnreachable(f"the broker is unreachable: {error}") from error


def alive(client: redis.Redis, pools: Sequence[ProbedPool]) -> set[str]:
    """Return the ids of the pools that work on direct requests now. Raises BrokerUnreachable."""
    try:
        found: Any = client.mget([direct.alive_key(pool.id) for pool in pools])
        return {pool.id for pool, value in zip(pools, found, strict=True) if value is not None}
    except (redis.RedisError, OSError) as error:
        raise BrokerUnreachable(f"the broker is unreachable: {error}") from error


def _ask(client: redis.Redis, pools: Sequence[ProbedPool], created: int, seconds: float) -> dict[str, ProbeAnswer]:
    streams: dict[str, str] = {}
    last: dict[Any, Any] = {}
    with client.pipeline(transaction=False) as pipeline:
        for pool in pools:
            request = DirectRequest.new(
                pool.model.name, body_of(pool.model), PriorityClass.INTERACTIVE.value, {}, created, is_recorded=False
            )
            stream = token_stream.key(str(request.run_id), direct.STEP)
            streams[stream], last[stream] = pool.id, token_stream.START
            pipeline.delete(direct.probe_key(pool.id))
            pipeline.rpush(direct.probe_key(pool.id), request.encoded())
            pipeline.expire(direct.probe_key(pool.id), _KEPT_SECONDS)
        pipeline.execute()
    began = time.monotonic()
    answers: dict[str, ProbeAnswer] = {}
    try:
        while last and (left := began + seconds - time.monotonic()) > 0:
            # A wait of at most a second: the client gives up an answer after two.
            found: Any = client.xread(last, block=max(1, min(1000, int(left * 1000))))
            for key, entries in found or ():
                stream = key.decode() if isinstance(key, bytes) else key
                for id_, fields in entries:
                    last[stream] = id_
                    entry = token_stream.read_entry(id_, fields)
                    if entry is not None and entry.kind in (EntryKind.DONE, EntryKind.FAILED):
                        error = entry.json()["message"] if entry.kind is EntryKind.FAILED else None
                        answers[streams[stream]] = ProbeAnswer(time.monotonic() - began, error)
                        del last[stream]
                        break
    finally:
        client.delete(*streams, *(direct.probe_key(pool.id) for pool in pools))
    return answers

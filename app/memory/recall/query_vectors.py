"""
The vector of a query, from a pool that serves the embedding model.

The request goes directly to a pool over Redis, from any process, and is no run. It is answered within a time limit or
not at all: no query waits for a model to be loaded. A request that no pool takes leaves a note, upon which the job of
recall has the model loaded.

Redis keys:
    arriero:recall:wanted:<model slug>   a query needed this model, and no pool took the request; it expires
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import redis

from app.catalog.catalog import Catalog
from app.catalog.model import Model
from app.inference import direct, token_stream
from app.inference.direct import DirectRequest
from app.inference.requests import PriorityClass
from app.inference.token_stream import EntryKind
from app.kernel import broker, clock, log
from app.kernel.sections.recall import RecallSettings
from app.memory.recall.query import QueryVectors

_log = log.get(__name__)

#: Seconds for which a note holds, and for which a list of requests is kept after the last one.
_NOTE_SECONDS, _LIST_SECONDS = 60, 10


def wanted_key(slug: str) -> str:
    """The key of the note that a query needed this model."""
    return f"arriero:recall:wanted:{slug}"


class QueryEmbedder:
    """Makes the vectors of queries. Safe for threads; connects when it is used."""

    def __init__(self, redis_url: str, catalog: Callable[[], Catalog], settings: Callable[[], RecallSettings]) -> None:
        self._redis = broker.connect(redis_url)
        self._catalog, self._settings = catalog, settings

    def __call__(self, text: str, models: Sequence[str]) -> QueryVectors:
        """Return the vectors of a text by these models, as many as come in time, or the reason for none."""
        if not self._settings().embedding_model:
            return QueryVectors(reason="no embedding model is configured (setting recall.embedding_model)")
        until = time.monotonic() + self._settings().query_timeout.total_seconds()
        found: dict[str, tuple[float, ...]] = {}
        reasons: list[str] = []
        for name in models:
            model = self._catalog().resolve(name)
            if model is None:
                reasons.append(f"the catalogue has no model {name!r} any more")
                continue
            try:
                answer = self._vector(text, model, until)
            except (redis.RedisError, OSError) as error:
                answer = f"the broker is unreachable: {error}"
            if isinstance(answer, str):
                reasons.append(answer)
            else:
                found[name] = answer
        return QueryVectors(found, "; ".join(reasons) or None)

    def take_note(self, slug: str) -> bool:
        """Whether a query needed this model and no pool took the request. The note is taken away."""
        try:
            return bool(self._redis.delete(wanted_key(slug)))
        except (redis.RedisError, OSError):
            return False

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def _vector(self, text: str, model: Model, until: float) -> tuple[float, ...] | str:
        """Return the vector, or the reason why there is none."""
        body = {"model": model.name, "input": [text], "long_text": "chunk", "task": "query"}
        created = int(clock.now().timestamp())
        request = DirectRequest(
            DirectRequest.new(model.name, body, PriorityClass.INTERACTIVE, {}, created).run_id,
            *(model.name, body, PriorityClass.INTERACTIVE.value, {}, created),
            is_recorded=False,
        )
        message, requests = request.encoded(), direct.requests_key(model.slug)
        stream = token_stream.key(str(request.run_id), direct.STEP)
        self._redis.rpush(requests, message)
        taken_until = time.monotonic() + direct.TAKEN_WITHIN.total_seconds()
        last: Any = token_stream.START
        try:
            while True:
                is_taken = last != token_stream.START
                left = (until if is_taken else min(until, taken_until)) - time.monotonic()
                answer: Any = self._redis.xread({stream: last}, block=max(1, int(left * 1000))) if left > 0 else None
                if not answer:
                    return self._given_up(model, requests, message, is_taken=is_taken)
                for id_, fields in answer[0][1]:
                    last = id_
                    entry = token_stream.read_entry(id_, fields)
                    if entry is not None and entry.kind is EntryKind.DONE:
                        return tuple(map(float, entry.json()["data"][0]["embedding"]))
                    if entry is not None and entry.kind is EntryKind.FAILED:
                        return f"{model.name} made no vector: {entry.json()['message']}"
        finally:
            self._redis.delete(stream)

    def _given_up(self, model: Model, requests: str, message: str, *, is_taken: bool) -> str:
        self._redis.lrem(requests, 1, message)
        self._redis.expire(requests, _LIST_SECONDS)
        if is_taken:
            seconds = self._settings().query_timeout.total_seconds()
            return f"{model.name} made no vector within {seconds:g} s (setting recall.query_timeout)"
        self._redis.set(wanted_key(model.slug), "1", ex=_NOTE_SECONDS)
        return f"no pool of {model.name} has a free slot; it is loaded now if it was not: try again"

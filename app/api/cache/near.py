"""
Similar chats: a chat whose last message means the same as that of a kept one gets its answer.

All else is equal: the namespace, the model's build, the messages before, the parameters. The messages are compared by
the cosine of their embeddings, which a model of the catalogue computes. When it does not answer in time, the chat is
computed as any other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np
from redis.asyncio import Redis

from app.api.openai.road import Road, Waiting
from app.catalog.model import Model
from app.inference.cache import key as keys
from app.inference.direct import DirectRequest
from app.inference.token_stream import EntryKind
from app.kernel import log
from app.kernel.errors import ArrieroError
from app.kernel.sections.cache import CacheSettings

_log = log.get(__name__)

#: Most seconds for the embedding of a message.
_PATIENCE = 2.0
#: Most chats of a group that are compared; newer ones replace the oldest.
_MOST = 200
#: Characters of a digest.
_DIGEST = 64


@dataclass(frozen=True, slots=True)
class EmbeddedChat:
    """The last message of a chat as a vector of length 1, and the group of chats that it is compared with."""

    group: str
    vector: bytes


class SimilarChats:
    """The chats that are kept, by the embeddings of their last messages."""

    def __init__(
        self, client: Redis, road: Road, settings: CacheSettings, find_model: Callable[[str], Model | None]
    ) -> None:
        """Does not connect."""
        self._redis, self._road, self._settings, self._find_model = client, road, settings, find_model

    async def embedded(self, request: DirectRequest, namespace: str, build: str) -> EmbeddedChat | None:
        """The chat of a request; None for one that is not compared, or whose message was not embedded in time."""
        place = keys.group_of(namespace, request.model, build, request.body)
        if not self._settings.near_model or place is None:
            return None
        model = self._find_model(self._settings.near_model)
        if model is None or not model.serves_embeddings:
            _log.warning("near_model_serves_no_embeddings", model=self._settings.near_model)
            return None
        group, text = place
        body = {"model": model.name, "input": [text], "long_text": "truncate"}
        asked = DirectRequest.new(model.name, body, request.priority, request.labels, request.created)
        try:
            async with asyncio.timeout(_PATIENCE), aclosing(self._road.send(asked, model)) as entries:
                async for entry in entries:
                    if not isinstance(entry, Waiting) and entry.kind is EntryKind.DONE:
                        found = np.asarray(entry.json()["data"][0]["embedding"], "<f4")
                        return EmbeddedChat(group, found.tobytes())
        except (TimeoutError, ArrieroError) as error:
            _log.warning("message_not_embedded", model=model.name, error=str(error) or "it took too long")
        return None

    async def find(self, chat: EmbeddedChat) -> tuple[str, float] | None:
        """The digest of the most similar chat, and the similarity; None when none is similar enough."""
        rows = [row for row in await self._rows(chat.group) if len(row) == _DIGEST + len(chat.vector)]
        if not rows:
            return None
        vectors = np.stack([np.frombuffer(row[_DIGEST:], "<f4") for row in rows])
        scores = vectors @ np.frombuffer(chat.vector, "<f4")
        best = int(scores.argmax())
        if float(scores[best]) < self._settings.near_threshold:
            return None
        return rows[best][:_DIGEST].decode(), min(float(scores[best]), 1.0)

    async def add(self, chat: EmbeddedChat, digest: str) -> None:
        """Keep a chat whose answer is kept."""
        key = _key(chat.group)
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.lpush(key, digest.encode() + chat.vector)
            pipeline.ltrim(key, 0, _MOST - 1)
            pipeline.pexpire(key, self._settings.ttl)
            await pipeline.execute()

    async def _rows(self, group: str) -> list[bytes]:
        # One read: a group has at most _MOST chats.
        return [bytes(row) for row in await self._redis.lrange(_key(group), 0, -1)]  # type: ignore[arg-type] # the client returns bytes, its types say text


def _key(group: str) -> str:
    return f"arriero:cache:near:{group}"

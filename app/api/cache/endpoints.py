"""The resource `cache`: what the response cache keeps and did, and its purge."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import redis
from fastapi import Query, Request
from pydantic import BaseModel, Field

from app.access.callers import KeyScope
from app.api import problems
from app.api.cache.answers import Answers
from app.api.callers import ListedNamespace, requires
from app.api.routers import ApiRouter
from app.inference.cache.store import CacheStore
from app.kernel.errors import BrokerUnreachable

router = ApiRouter(prefix="/v1/cache", tags=["cache"], dependencies=[requires(KeyScope.READ)])


class CachedModelOut(BaseModel):
    """The cached answers of a model in a namespace, and its calls that the cache was asked for."""

    namespace: str
    model: str
    entries: int = Field(description="kept answers")
    bytes: int
    hits: int = Field(description="calls that got a kept answer, similar ones included")
    near: int = Field(description="of them, calls that got the answer of a similar request")
    shared: int = Field(description="calls that got the answer of an equal call that was being computed")
    misses: int = Field(description="calls whose answer was computed")


class CacheStatsOut(BaseModel):
    """The response cache. Calls are counted since the first one."""

    enabled: bool
    models: list[CachedModelOut]


class PurgeOut(BaseModel):
    """A purge."""

    removed: int = Field(description="number of removed answers")


@router.get("", summary="Show the response cache", responses=problems.documented(422))
async def stats(request: Request, namespace: ListedNamespace) -> CacheStatsOut:
    """What is kept, and how many calls it served, by namespace and model."""
    answers: Answers = request.app.state.answers
    async with _store(answers) as store:
        found = await store.stats(namespace)
    return CacheStatsOut(
        enabled=answers.is_enabled,
        models=[
            CachedModelOut(
                namespace=one.namespace,
                model=one.model,
                entries=one.entries,
                bytes=one.bytes,
                hits=one.calls.get("hit", 0) + one.calls.get("near", 0),
                near=one.calls.get("near", 0),
                shared=one.calls.get("shared", 0),
                misses=one.calls.get("miss", 0) - one.calls.get("near", 0),
            )
            for one in found
        ],
    )


@router.delete(
    "",
    summary="Purge the response cache",
    responses=problems.documented(422),
    dependencies=[requires(KeyScope.OPERATE)],
)
async def purge(
    request: Request,
    namespace: ListedNamespace,
    model: Annotated[str | None, Query(max_length=200, description="only answers of this model")] = None,
) -> PurgeOut:
    """Remove kept answers: all of the caller's, or those of a model or a namespace. Counters stay."""
    async with _store(request.app.state.answers) as store:
        return PurgeOut(removed=await store.purge(namespace, model))


@asynccontextmanager
async def _store(answers: Answers) -> AsyncIterator[CacheStore]:
    try:
        yield answers.store
    except (redis.RedisError, OSError) as error:
        raise BrokerUnreachable(f"the broker is unreachable: {error}") from error

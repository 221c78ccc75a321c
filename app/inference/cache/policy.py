"""
The policy of a request towards the response cache: whether it may get a cached answer, and whether its own is kept.

A deterministic request is cached by itself: greedy sampling, a fixed seed, embeddings, reranking. Another one opts in
with `Cache-Control: max-age=N`. `no-cache` asks for a new answer, `no-store` for one that is not kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

_MAX_AGE = re.compile(r"max-age=\"?(\d{1,9})\"?")


class CacheStatus(StrEnum):
    """What the response cache did for a call."""

    #: The answer was kept from an earlier call.
    HIT = "hit"
    #: The answer of a similar request.
    NEAR = "near"
    #: The answer of an equal request that was being computed.
    SHARED = "shared"
    #: Nothing was found, and the answer is kept.
    MISS = "miss"
    #: The cache was not asked.
    BYPASS = "bypass"


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """What a call wants of the cache."""

    #: It may get a cached answer.
    reads: bool
    #: Its answer is kept.
    writes: bool
    #: Most seconds since the answer was computed; None for the lifetime of answers.
    max_age: int | None = None


BYPASS = CachePolicy(reads=False, writes=False)


def policy_of(body: Mapping[str, Any], cache_control: str | None) -> CachePolicy:
    """The policy of a request. `cache_control` is the header; directives that are not known have no effect."""
    if body.get("conversation_id") is not None or body.get("memory") is not None:
        return BYPASS  # the answer depends on what is stored, and is stored itself
    if has_images(body):
        return BYPASS  # requests are compared by their texts
    directives = [part.strip().lower() for part in (cache_control or "").split(",")]
    ages = [int(found[1]) for part in directives if (found := _MAX_AGE.fullmatch(part))]
    max_age = min(ages) if ages else None
    if not (max_age or is_deterministic(body)):
        return BYPASS
    return CachePolicy(
        reads="no-cache" not in directives and max_age != 0, writes="no-store" not in directives, max_age=max_age
    )


def has_images(body: Mapping[str, Any]) -> bool:
    """Whether a message of a chat completion has an image."""
    contents = [message.get("content") for message in body.get("messages") or () if isinstance(message, Mapping)]
    parts = [part for content in contents if isinstance(content, list | tuple) for part in content]
    return any(isinstance(part, Mapping) and part.get("type") == "image_url" for part in parts)


def is_deterministic(body: Mapping[str, Any]) -> bool:
    """Whether the same request has the same answer: it does not depend on chance."""
    if "input" in body or "query" in body:
        return True
    return (
        body.get("temperature") == 0 or body.get("top_k") == 1 or body.get("top_p") == 0 or body.get("seed") is not None
    )

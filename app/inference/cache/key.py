"""
The key of a cached answer: a hash of everything that the answer depends on, and of the namespace.

Two requests have the same key only if the same model build would do the same for the same namespace.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Changes with the form of cached answers.
_VERSION = 2
#: Fields of a request that do not change its answer.
_WITHOUT_EFFECT = frozenset({"model", "stream", "stream_options", "service_tier", "user"})


@dataclass(frozen=True, slots=True)
class CacheKey:
    """Where an answer is kept."""

    namespace: str
    model: str
    digest: str
    #: The class of the call: an interactive one does not wait for the computation of a batch.
    priority: str = "interactive"

    @property
    def flight(self) -> str:
        """The id of the computation of this answer."""
        return f"{self.digest}:{self.priority}"

    @property
    def owner(self) -> str:
        """The namespace and the model, as indexes and counters have them. Neither name can hold the separator."""
        return f"{self.namespace}|{self.model}"


def key_of(namespace: str, model: str, build: str, body: Mapping[str, Any], priority: str) -> CacheKey:
    """The key of a request. `build` identifies the model's file, its options and the engine."""
    asked = {name: value for name, value in body.items() if name not in _WITHOUT_EFFECT}
    return CacheKey(namespace, model, _digest([_VERSION, namespace, model, build, asked]), priority)


def group_of(namespace: str, model: str, build: str, body: Mapping[str, Any]) -> tuple[str, str] | None:
    """
    The group of a chat whose answers may serve for similar last messages, and that message.

    Equal in a group: all messages before the last one, and all parameters. None for what is no chat that ends with a
    text of the user.
    """
    messages = body.get("messages")
    if not messages or messages[-1].get("role") != "user" or not isinstance(messages[-1].get("content"), str):
        return None
    asked = {name: value for name, value in body.items() if name not in _WITHOUT_EFFECT}
    asked["messages"] = messages[:-1]
    return _digest([_VERSION, "near", namespace, model, build, asked]), messages[-1]["content"]


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()

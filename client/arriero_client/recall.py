"""Recall: what was said, found by words and by meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from arriero_client import exchange
from arriero_client.effects import Operation, Request
from arriero_client.exchange import Retries
from arriero_client.operations import operation


@dataclass(frozen=True)
class Recollection:
    """A passage that was found: a message, a memory, a block or a document, or a part of one."""

    text: str
    #: `message`, `memory`, `block` or `document`, and its id.
    source: str
    source_id: str
    score: float
    #: In words.
    why: str
    at: datetime
    user: str | None
    conversation: str | None
    role: str | None
    speaker: str | None
    kind: str | None
    #: The whole passage, as the server sent it.
    raw: dict[str, Any]


@dataclass(frozen=True)
class Recollections:
    """Passages, the best first."""

    passages: Sequence[Recollection]
    #: Whether the meaning of the query was searched, not only its words; and why not.
    is_dense: bool
    dense_reason: str | None


class Recalling:
    """The operations of recall."""

    retries: Retries

    @operation
    def recall(
        self,
        /,
        query: str,
        *,
        user: str | None = None,
        scope: Literal["own", "shared", "all"] = "own",
        mode: Literal["hybrid", "lexical", "dense"] = "hybrid",
        limit: int = 10,
        **filters: Any,
    ) -> Operation[Recollections]:
        """
        Return what was said that has most to do with a query.

        `filters` are the other fields of `POST /v1/recall`: `sources`, `conversations`, `roles`, `kinds`, `since` and
        `until` (aware datetimes or texts), `half_life`, `neighbours`.
        """
        body: dict[str, Any] = {"query": query, "scope": scope, "mode": mode, "limit": limit}
        if user is not None:
            body["user"] = user
        for name, value in filters.items():
            if value is not None:
                body[name] = value.isoformat() if isinstance(value, datetime) else value
        found = yield from exchange.send_json(Request("POST", "/v1/recall", body=body), self.retries)
        dense = found["dense"]
        return Recollections([_passage(one) for one in found["passages"]], dense["used"], dense["reason"])

    @operation
    def recall_status(self) -> Operation[dict[str, Any]]:
        """Return what can be recalled, and how far the vectors are behind."""
        found: dict[str, Any] = yield from exchange.send_json(Request("GET", "/v1/recall/status"), self.retries)
        return found


def _passage(one: dict[str, Any]) -> Recollection:
    names = ("text", "source", "source_id", "score", "why", "user", "conversation", "role", "speaker", "kind")
    return Recollection(**{name: one[name] for name in names}, at=datetime.fromisoformat(one["at"]), raw=one)

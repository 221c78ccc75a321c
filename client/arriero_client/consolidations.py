"""Consolidations: what users say again and again becomes patterns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict

from arriero_client import exchange
from arriero_client.effects import Operation, Request
from arriero_client.exchange import Retries
from arriero_client.operations import operation


class Consolidation(BaseModel):
    """A consolidation. Fields that a newer server adds are kept as extra attributes."""

    model_config = ConfigDict(extra="allow", frozen=True)

    id: str
    namespace: str = ""
    state: str
    model: str = ""
    review_model: str = ""
    #: Why its turns cannot be read yet; empty: it does not wait.
    waits_for: str = ""
    turns: int = 0
    clusters: int = 0
    has_more: bool = False
    #: `requests` and `done`.
    progress: Mapping[str, int] = {}
    written: int = 0
    merged: int = 0
    refused: int = 0
    #: What became of each cluster.
    outcomes: Sequence[Mapping[str, Any]] = ()
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None
    error: str = ""
    created_at: datetime
    finished_at: datetime | None = None
    #: Of `consolidate`: False if the namespace had one that has not ended.
    created: bool = True

    @property
    def has_ended(self) -> bool:
        """Whether nothing more happens."""
        return self.state in ("succeeded", "failed", "cancelled")


class ConsolidationSchedule(BaseModel):
    """How often a namespace is consolidated."""

    model_config = ConfigDict(extra="allow", frozen=True)

    namespace: str
    #: None: only by hand.
    every: str | None = None
    next_at: datetime | None = None
    model: str | None = None
    review_model: str | None = None


class Consolidating:
    """The operations on consolidations."""

    retries: Retries

    @operation
    def consolidate(
        self, *, model: str | None = None, review_model: str | None = None, namespace: str | None = None
    ) -> Operation[Consolidation]:
        """Look for patterns in what is new in a namespace. One that has not ended is returned instead."""
        given = {"model": model, "review_model": review_model}
        body = {name: one for name, one in given.items() if one is not None}
        request = Request("POST", "/v1/consolidations", {"namespace": namespace}, body=body)
        return Consolidation.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def consolidations(
        self, *, namespace: str | None = None, after: str | None = None, limit: int = 50
    ) -> Operation[Sequence[Consolidation]]:
        """Return consolidations, the newest first."""
        request = Request("GET", "/v1/consolidations", {"namespace": namespace, "after": after, "limit": limit})
        found = yield from exchange.send_json(request, self.retries)
        return [Consolidation.model_validate(one) for one in found["consolidations"]]

    @operation
    def consolidation(self, consolidation_id: str) -> Operation[Consolidation]:
        """Return a consolidation, with its progress."""
        request = Request("GET", _path(consolidation_id))
        return Consolidation.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def cancel_consolidation(self, consolidation_id: str) -> Operation[Consolidation]:
        """Cancel a consolidation. Its turns are read by the next one."""
        request = Request("POST", f"{_path(consolidation_id)}/cancel", body={}, repeatable=False)
        return Consolidation.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def consolidation_schedule(self, *, namespace: str | None = None) -> Operation[ConsolidationSchedule]:
        """Return how often a namespace is consolidated."""
        request = Request("GET", "/v1/consolidations/schedule", {"namespace": namespace})
        return ConsolidationSchedule.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def set_consolidation_schedule(
        self,
        every: str | None,
        *,
        model: str | None = None,
        review_model: str | None = None,
        namespace: str | None = None,
    ) -> Operation[ConsolidationSchedule]:
        """Choose how often a namespace is consolidated: an interval such as "1d"; None for only by hand."""
        body = {"every": every, "model": model, "review_model": review_model}
        request = Request("PUT", "/v1/consolidations/schedule", {"namespace": namespace}, body=body)
        return ConsolidationSchedule.model_validate((yield from exchange.send_json(request, self.retries)))


def _path(consolidation_id: str) -> str:
    return f"/v1/consolidations/{quote(consolidation_id, safe='')}"

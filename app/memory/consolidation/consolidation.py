"""
A consolidation: turns of a namespace are read once, and what recurs in them becomes patterns.

`queued`: it waits until its turns have vectors, then they are clustered. `running`: a run reads the clusters.
`succeeded`, `failed` and `cancelled` are final.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

from app.files.file import shown_id

#: The prefix of the ids of consolidations.
PREFIX = "cons_"
#: Shortest interval of a namespace's consolidations.
SHORTEST_INTERVAL = timedelta(minutes=1)


class ConsolidationState(StrEnum):
    """How far a consolidation is."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


#: States in which nothing more happens.
FINAL_CONSOLIDATIONS = frozenset(
    {ConsolidationState.SUCCEEDED, ConsolidationState.FAILED, ConsolidationState.CANCELLED}
)


class PatternOutcome(StrEnum):
    """What became of a cluster."""

    WRITTEN = "written"
    #: A known pattern says the same: it has more sources now.
    MERGED = "merged"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Consolidation:
    """A consolidation as it is stored; the fields are those of its row."""

    id: UUID
    namespace: str
    state: str
    requested_by: str
    model: str
    review_model: str
    read_after: int
    read_through: int
    horizon: int
    waits_for: str
    restarts: int
    turns: int
    leftovers: int
    clusters: int
    has_more: bool
    plan: Sequence[Mapping[str, Any]]
    noise: Sequence[int]
    run_id: UUID | None
    error: str
    written: int
    merged: int
    refused: int
    outcomes: Sequence[Mapping[str, Any]]
    tokens_in: int
    tokens_out: int
    cost: float | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


@dataclass(frozen=True, slots=True)
class ConsolidationProgress:
    """How much of a consolidation's run is done, and what it has cost."""

    requests: int = 0
    done: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None


@dataclass(frozen=True, slots=True)
class ConsolidationPolicy:
    """What a namespace has chosen, and how far it was read."""

    namespace: str
    read_through: int = 0
    #: None: only by hand.
    every: timedelta | None = None
    next_at: datetime | None = None
    #: None: as the settings have it.
    model: str | None = None
    review_model: str | None = None


@dataclass(frozen=True, slots=True)
class TurnCluster:
    """Turns that say similar things, of one user."""

    user: str | None
    #: Those nearest to the middle first; each by the number of its passage.
    passages: tuple[int, ...]

    def stored(self) -> dict[str, Any]:
        """The cluster as JSON."""
        return {"user": self.user, "passages": list(self.passages)}

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> TurnCluster:
        """Return a stored cluster."""
        return cls(stored["user"], tuple(stored["passages"]))


def shown_consolidation(id_: UUID) -> str:
    """Return the id of a consolidation as the API shows it."""
    return shown_id(id_, PREFIX)

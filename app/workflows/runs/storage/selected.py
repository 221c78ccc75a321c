"""Runs and steps as the statements of `store` and `items` return them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID


@dataclass(frozen=True, slots=True)
class LockedRun:
    """A run under its lock."""

    id: UUID
    namespace: str
    workflow: str
    sha256: str
    state: str
    ending: str | None
    paused: bool
    priority: str
    rank: int
    labels: dict[str, str]
    concurrency_key: str | None
    parent_step_id: UUID | None
    depth: int
    error: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class LockedStep:
    """A step of a run under its lock, or an item of a map of it."""

    id: UUID
    key: str
    kind: str
    parent_id: UUID | None
    model: str | None
    model_index: int
    queue: str
    priority: str
    rank: int
    state: str
    branch: str | None
    delegated: bool
    awaits: dict[str, Any] | None
    attempt: int
    failures: int
    losses: int
    owner: str | None
    error: dict[str, Any] | None
    #: Whether its lease has expired; None without a lease.
    expired: bool | None
    #: Whether the time for the whole step is over; None without a limit.
    late: bool | None


@dataclass(frozen=True, slots=True)
class LockedItem(LockedStep):
    """An item of a map, with the counts of the map."""

    total: int
    waiting: int
    in_flight: int
    failed: int
    stopping: bool
    truncated: int
    map_tokens_in: int
    map_tokens_out: int


@dataclass(frozen=True, slots=True)
class ClaimedStep:
    """A step that a worker has just claimed, with what its work needs of the run."""

    id: UUID
    run_id: UUID
    key: str
    kind: str
    attempt: int
    parent_id: UUID | None
    #: The index and the value of an item.
    item: int | None
    input: Any
    input_sha256: str | None
    model: str | None
    #: What is left of the time for the whole step.
    remaining: timedelta | None
    namespace: str
    workflow: str
    sha256: str
    priority: str
    run_state: str
    run_ending: str | None
    depth: int
    trace_parent: str | None
    #: The run is still queued, and another transaction has locked it.
    to_begin: bool


@dataclass(frozen=True, slots=True)
class ReadyStep:
    """A step that became ready, or whose message is sent again."""

    id: UUID
    key: str
    attempt: int
    queue: str
    priority: str
    rank: int


@dataclass(frozen=True, slots=True)
class RenewedStep:
    """A step whose lease was extended."""

    id: UUID
    attempt: int
    state: str


@dataclass(frozen=True, slots=True)
class SubmittedRun:
    """A run that came under an idempotency key."""

    id: UUID
    #: The hash of the request.
    request_sha256: str | None

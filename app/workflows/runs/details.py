"""
Details: runs, steps, items and attempts as `views` returns them.

A value `output` is in the fields `output`, `output_sha256` and `output_bytes`; `output_shown` says whether it is short
enough to be shown. In the place of a longer value is an `Elsewhere`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """In the place of a value that is too long to be shown with others."""

    #: Of the value as JSON.
    bytes: int


@dataclass(frozen=True, slots=True)
class RunDetails:
    """A run."""

    id: UUID
    namespace: str
    workflow: str
    version: int | None
    sha256: str
    state: str
    paused: bool
    priority: str
    rank: int
    labels: dict[str, str]
    inputs: Any
    inputs_sha256: str | None
    inputs_bytes: int | None
    inputs_shown: bool | None
    output: Any
    output_sha256: str | None
    output_bytes: int | None
    output_shown: bool | None
    error: dict[str, Any] | None
    idempotency_key: str | None
    concurrency_key: str | None
    parent_step_id: UUID | None
    #: The run of the step that called it.
    parent_run_id: UUID | None
    forked_from: UUID | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    deadline_at: datetime | None
    #: The forecast at its submission.
    expected: dict[str, Any] | None
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class _Worked:
    """The fields that steps and items share."""

    id: UUID
    key: str
    model: str | None
    state: str
    attempt: int
    failures: int
    losses: int
    owner: str | None
    output: Any
    output_sha256: str | None
    output_bytes: int | None
    output_shown: bool | None
    finish_reason: str | None
    error: dict[str, Any] | None
    tokens_in: int
    tokens_out: int
    not_before: datetime | None
    ready_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None


@dataclass(frozen=True, slots=True)
class StepDetails(_Worked):
    """A step."""

    kind: str
    branch: str | None
    awaits: dict[str, Any] | None
    #: Its work is done by items or by a called run.
    delegated: bool
    deadline_at: datetime | None
    #: Counts of a map that was expanded.
    items: int | None
    items_waiting: int | None
    items_in_flight: int | None
    items_failed: int | None
    items_truncated: int | None
    #: The last run that it called.
    called_run_id: UUID | None
    #: Why no pool of its model is started, while the step or one of its items waits for one.
    waiting_reason: str | None


@dataclass(frozen=True, slots=True)
class ItemDetails(_Worked):
    """An item of a map or of an agent."""

    #: `turn` (of the model) or `call` (of a tool), of an agent; otherwise the kind of the map's steps.
    kind: str
    #: The index from 0, and the value.
    item: int
    input: Any
    input_sha256: str | None
    input_bytes: int | None
    input_shown: bool | None


@dataclass(frozen=True, slots=True)
class AttemptDetails:
    """An attempt of a step."""

    step_id: UUID
    attempt: int
    owner: str
    model: str | None
    started_at: datetime
    finished_at: datetime | None
    outcome: str | None
    message: str | None
    text: str | None
    tokens_in: int | None
    tokens_out: int | None
    tokens_cached: int | None
    first_token_ms: int | None
    finish_reason: str | None
    #: In the currency of the settings; None where it is not known.
    cost: float | None
    #: The prices that held, and the device time.
    cost_basis: Mapping[str, Any] | None
    #: What its prompt was put together of; None where nothing was.
    assembly: Mapping[str, Any] | None
    #: What hooks did to it, in their order; None where none was called.
    hooks: Sequence[Mapping[str, Any]] | None


@dataclass(frozen=True, slots=True)
class RunView:
    """A run with its steps and their attempts."""

    run: RunDetails
    definition: Mapping[str, Any]
    steps: Sequence[StepDetails]
    #: By step id, the first attempt first.
    attempts: Mapping[UUID, Sequence[AttemptDetails]]
    #: Of all attempts, those of items included; None where no model has a price.
    cost: float | None = None


@dataclass(frozen=True, slots=True)
class ListedRun:
    """A run in a list."""

    id: UUID
    namespace: str
    workflow: str
    version: int | None
    state: str
    paused: bool
    priority: str
    rank: int
    labels: dict[str, str]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    steps: int
    steps_succeeded: int
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True, slots=True)
class Page:
    """Some runs, and the cursor of the next page when there is one."""

    runs: Sequence[ListedRun]
    next_cursor: UUID | None


@dataclass(frozen=True, slots=True)
class HistoryRecord:
    """An entry of the history of a run, as it was stored."""

    id: int
    at: datetime
    #: The key of the step that it is about; None for the run.
    step: str | None
    attempt: int | None
    event: str
    cause: dict[str, Any] | None

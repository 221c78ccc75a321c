"""Runs, steps, items and attempts as answers of the API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from pydantic import BaseModel, Field

from app.api.workflows import payloads
from app.inference.prediction.forecast import Forecast
from app.inference.prediction.residuals import Interval
from app.inference.prediction.service import Predictions
from app.kernel import clock
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.workflows.runs import live_tokens, views
from app.workflows.runs.details import RunView
from app.workflows.runs.live_tokens import LiveTokens
from app.workflows.state_machine.states import RunState, StepState

_FINISH_REASON: Any = Field(
    description="why the model's text ended: `stop`, `length` when it was cut at `max_tokens`, `tool_calls`, "
    "`content_filter`; null without a text"
)


class AttemptOut(BaseModel):
    """One attempt of a step by one worker."""

    attempt: int
    worker: str
    model: str | None
    started_at: datetime
    finished_at: datetime | None
    outcome: str | None = Field(description="`succeeded`, or the reason of the failure; null while it is running")
    message: str | None
    text: str | None = Field(description="the text of the model, kept when it was invalid")
    tokens_in: int | None
    tokens_out: int | None
    tokens_cached: int | None
    first_token_ms: int | None
    finish_reason: str | None = _FINISH_REASON
    cost: float | None = Field(description="what it cost by the prices of that time; null where that is not known")
    cost_basis: dict[str, Any] | None = Field(
        description="the prices that held: of a million tokens, or of the time of devices (`device_us`) and "
        "energy; null where there are none"
    )
    assembly: dict[str, Any] | None = Field(
        description="how its prompt was put together: tokens and budget of each part, and what was left out with the "
        "reason; null for a step without a conversation or memory"
    )
    hooks: list[dict[str, Any]] | None = Field(
        description="the hooks that were called, in their order: `hook`, `at`, `result`, `ms`, `annotations`, `error`; "
        "null where none was"
    )


class ItemCounts(BaseModel):
    """The numbers of items of a map."""

    total: int
    waiting: int
    in_flight: int
    failed: int
    truncated: int = Field(description="items whose text was cut at `max_tokens`")


class LiveOut(BaseModel):
    """The tokens of the attempts that run now. They are a second or two old."""

    tokens_out: int
    tokens_per_s: float | None = Field(description="since the first token; null when that is not known yet")


class ExpectedTimeOut(BaseModel):
    """An expected time in seconds. In 80 % of cases the truth is between `low` and `high`."""

    seconds: float
    low: float
    high: float


class RunForecastOut(ExpectedTimeOut):
    """The expected time of a run, from its submission to its end."""

    basis: str = Field(
        description="`history`: all its steps were seen before; `partly`: some; `defaults`: none, so it is a guess"
    )
    warning: str | None = Field(default=None, description="the deadline will probably not be met")


class RemainingOut(ExpectedTimeOut):
    """The expected time until a run ends."""

    basis: str


class StepOut(BaseModel):
    """A step of a run."""

    id: UUID
    key: str
    kind: str
    model: str | None = Field(description="the model that it uses, or used last")
    state: StepState
    needs: list[str] = Field(description="the steps that it depends on")
    branch: str | None = Field(description="the branch that a switch or a wait took")
    awaits: dict[str, Any] | None = Field(description="the event, run or time that an awaiting step waits for")
    attempt: int
    worker: str | None = Field(description="the worker that holds it now")
    output: Any
    finish_reason: str | None = _FINISH_REASON
    error: dict[str, Any] | None
    tokens_in: int = Field(description="of all attempts that have ended; for a map, of all items that have ended")
    tokens_out: int
    live: LiveOut | None = Field(description="for a text that is being written, or a map of such; null otherwise")
    ready_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    next_attempt_at: datetime | None = Field(description="when a waiting step starts its next attempt")
    waited_s: float | None = Field(description="from ready to its first start")
    took_s: float | None = Field(description="from its first start to its end")
    deadline_at: datetime | None = Field(description="the end of its `total_timeout`")
    expected: ExpectedTimeOut | None = Field(
        description="the expected time in a slot of a step that has not ended; of a map, that of an item"
    )
    items: ItemCounts | None = Field(description="for a map that has started")
    called_run_id: UUID | None = Field(description="the run that it called last")
    waiting_reason: str | None = Field(
        description="why no pool of its model is started, while it or one of its items waits for one"
    )
    attempts: list[AttemptOut]


class ItemOut(BaseModel):
    """An item of a map or of an agent."""

    id: UUID
    key: str
    kind: str = Field(description="of an agent: `turn` of the model, or `call` of a tool; else that of the map's steps")
    index: int
    input: Any
    model: str | None
    state: StepState
    attempt: int
    worker: str | None
    output: Any
    finish_reason: str | None = _FINISH_REASON
    error: dict[str, Any] | None
    tokens_in: int
    tokens_out: int
    started_at: datetime | None
    finished_at: datetime | None
    took_s: float | None


class ItemsOut(BaseModel):
    """Some items of a map, by index."""

    items: list[ItemOut]
    next_first: int | None = Field(description="the value of `first` for the next page; null on the last page")


class RunSummary(BaseModel):
    """A run in a list."""

    id: UUID
    namespace: str = Field(description="to whom it belongs")
    workflow: str
    version: int | None
    state: RunState
    paused: bool
    priority: str
    rank: int
    labels: dict[str, str]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    tokens_in: int
    tokens_out: int


class RunListed(RunSummary):
    """A run in a list, with the number of its steps."""

    steps: int
    steps_succeeded: int


class RunOut(RunSummary):
    """A run with its steps."""

    inputs: dict[str, Any]
    output: Any = Field(
        description="as the workflow's `outputs` says, or the outputs of the steps on which no other depends, by id"
    )
    error: dict[str, Any] | None
    idempotency_key: str | None
    concurrency_key: str | None
    parent_run_id: UUID | None = Field(description="the run that called it")
    forked_from: UUID | None
    deadline_at: datetime | None
    expires_at: datetime | None = Field(description="the run may be deleted after this time")
    took_s: float | None = Field(description="from its submission to its end")
    expected: RunForecastOut | None = Field(description="as predicted at its submission; null where it was not")
    remaining: RemainingOut | None = Field(description="until its end; null for a run that has ended or is paused")
    cost: float | None = Field(description="of all its attempts; null when no price is known")
    steps: list[StepOut]


#: Why a step waits, for a caller who must not see what others do on the fleet.
WAITS = "no pool of its model can be started now; an operator sees why"


def out(
    view: RunView,
    live: Mapping[str, LiveOut] | None = None,
    predictions: Predictions | None = None,
    *,
    sees_fleet: bool,
) -> RunOut:
    """
    Return the answer for a run. `live` are the tokens of its running steps, by their keys.

    `sees_fleet` is whether the caller may read why a step waits, which names pools and namespaces of others.
    """
    run = view.run
    computed = {"took_s", "tokens_in", "tokens_out", "steps", "inputs", "output", "cost", "expected", "remaining"}
    needs = {
        step["id"]: step.get("needs", []) for part in ("steps", "on_failure") for step in view.definition.get(part, ())
    }
    left = None
    if predictions is not None:
        left = predictions.left(view, clock.now(), {key: one.tokens_out for key, one in (live or {}).items()})
    expected = {} if left is None else left.steps
    steps = [
        _step(
            step,
            run.id,
            view.attempts[step.id],
            needs[step.key],
            (live or {}).get(step.key),
            _expected(expected.get(step.key)),
        )
        for step in view.steps
    ]
    if not sees_fleet:
        steps = [step.model_copy(update={"waiting_reason": step.waiting_reason and WAITS}) for step in steps]
    return RunOut(
        **{name: getattr(run, name) for name in RunOut.model_fields if name not in computed},
        inputs=payloads.inline_or_reference(run.inputs, "inputs", run.id),
        output=payloads.inline_or_reference(run.output, "output", run.id),
        took_s=_seconds(run.created_at, run.finished_at),
        tokens_in=sum(step.tokens_in for step in steps),
        tokens_out=sum(step.tokens_out for step in steps),
        cost=view.cost,
        expected=None if run.expected is None else RunForecastOut.model_validate(run.expected),
        remaining=None if left is None else _remaining(left),
        steps=steps,
    )


def _expected(interval: Interval | None) -> ExpectedTimeOut | None:
    return None if interval is None else ExpectedTimeOut(**_figures(interval))


def _remaining(left: Forecast) -> RemainingOut:
    return RemainingOut(**_figures(left.interval), basis=str(left.basis))


def _figures(interval: Interval) -> dict[str, float]:
    return {name: round(getattr(interval, name), 3) for name in ("seconds", "low", "high")}


def live_of(view: RunView, database: Database, broker: CeleryPublisher) -> dict[str, LiveOut]:
    """Return the live tokens of the steps that run now; for a map, those of its running items together."""
    if not any(step.state == StepState.RUNNING or (step.delegated and step.items_in_flight) for step in view.steps):
        return {}
    reported = live_tokens.read(broker, view.run.id, clock.now())
    # A report may be a second older than the view: what has ended meanwhile is counted there.
    running = views.running(database, view.run.id, list(reported)) if reported else {}
    found: dict[str, list[LiveTokens]] = {}
    for key, one in reported.items():
        if running.get(key) == one.attempt:
            found.setdefault(key.partition("[")[0], []).append(one)
    return {key: _together(of) for key, of in found.items()}


def _together(of: Sequence[LiveTokens]) -> LiveOut:
    rates = [one.tokens_per_s for one in of if one.tokens_per_s is not None]
    return LiveOut(tokens_out=sum(one.tokens_out for one in of), tokens_per_s=round(sum(rates), 1) if rates else None)


def _step(
    step: Any,
    run_id: UUID,
    attempts: Sequence[Any],
    needs: list[str],
    live: LiveOut | None,
    expected: ExpectedTimeOut | None,
) -> StepOut:
    attempts_out = [
        AttemptOut(
            attempt=row.attempt,
            worker=row.owner,
            **{name: getattr(row, name) for name in AttemptOut.model_fields if name not in {"attempt", "worker"}},
        )
        for row in attempts
    ]
    computed = {
        "worker",
        "next_attempt_at",
        "waited_s",
        "took_s",
        "attempts",
        "items",
        "needs",
        "output",
        "live",
        "expected",
    }
    counts = None
    if step.items is not None:
        counts = ItemCounts(
            total=step.items,
            waiting=step.items_waiting,
            in_flight=step.items_in_flight,
            failed=step.items_failed,
            truncated=step.items_truncated,
        )
    return StepOut(
        **{name: getattr(step, name) for name in StepOut.model_fields if name not in computed},
        items=counts,
        needs=needs,
        live=live,
        expected=expected,
        worker=step.owner,
        output=payloads.inline_or_reference(step.output, "output", run_id, step.key),
        next_attempt_at=step.not_before,
        waited_s=_seconds(step.ready_at, step.started_at),
        took_s=_seconds(step.started_at, step.finished_at),
        attempts=attempts_out,
    )


def item_out(row: Any, run_id: UUID) -> ItemOut:
    computed = {"index", "worker", "took_s", "input", "output"}
    return ItemOut(
        **{name: getattr(row, name) for name in ItemOut.model_fields if name not in computed},
        index=row.item,
        input=payloads.inline_or_reference(row.input, "input", run_id, row.key),
        output=payloads.inline_or_reference(row.output, "output", run_id, row.key),
        worker=row.owner,
        took_s=_seconds(row.started_at, row.finished_at),
    )


def _seconds(begin: datetime | None, end: datetime | None) -> float | None:
    return None if begin is None or end is None else round((end - begin).total_seconds(), 3)

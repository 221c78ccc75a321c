"""Runs: submit, look at, list, cancel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, Query, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.api import bodies, problems
from app.api.bodies import Body
from app.api.services import Services, Use
from app.kernel.errors import InvalidInput, Problem
from app.workflows import check, registry, views
from app.workflows.check import Catalogued
from app.workflows.definition import Definition, Priority
from app.workflows.source import Source
from app.workflows.states import RunState, StepState
from app.workflows.submission import Submission
from app.workflows.views import RunView

router = APIRouter(prefix="/v1/runs", tags=["runs"])


class RunIn(BaseModel):
    """What to run: a named workflow, or a definition."""

    model_config = ConfigDict(extra="forbid")

    workflow: str | None = Field(default=None, description="the name of a workflow", examples=["support-triage"])
    version: int | None = Field(default=None, ge=0, description="of the named workflow; the newest without it")
    definition: dict[str, Any] | str | None = Field(
        default=None, description="a workflow as an object, or as YAML or JSON in a text"
    )
    inputs: dict[str, Any] = Field(default={}, examples=[{"message": "Where is my parcel?"}])
    priority: Priority | None = Field(default=None, description="instead of the workflow's own")


class AttemptOut(BaseModel):
    """One try of a step by one worker."""

    attempt: int
    worker: str
    started_at: datetime
    finished_at: datetime | None
    outcome: str | None = Field(description="`succeeded`, or the reason why not; null while it goes on")
    message: str | None
    text: str | None = Field(description="what the model wrote, kept when it was not usable")
    tokens_in: int | None
    tokens_out: int | None
    tokens_cached: int | None
    first_token_ms: int | None


class StepOut(BaseModel):
    """A step of a run."""

    id: UUID
    key: str
    kind: str
    model: str | None
    state: StepState
    attempt: int
    worker: str | None = Field(description="who holds it now")
    output: Any
    error: dict[str, Any] | None
    tokens_in: int
    tokens_out: int
    ready_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    next_attempt_at: datetime | None = Field(description="when a waiting step begins again")
    waited_s: float | None = Field(description="from ready to its first start")
    took_s: float | None = Field(description="from its first start to its end")
    attempts: list[AttemptOut]


class RunSummary(BaseModel):
    """A run in a list."""

    id: UUID
    workflow: str
    version: int | None
    state: RunState
    priority: str
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    tokens_in: int
    tokens_out: int


class RunListed(RunSummary):
    """A run in a list, with the count of its steps."""

    steps: int
    steps_succeeded: int


class RunOut(RunSummary):
    """A run, whole."""

    inputs: dict[str, Any]
    output: Any = Field(description="outputs of the steps that no other needs, by id; null until it succeeded")
    error: dict[str, Any] | None
    idempotency_key: str | None
    took_s: float | None = Field(description="from its submission to its end")
    steps: list[StepOut]


class PageOut(BaseModel):
    """Some runs, the newest first."""

    runs: list[RunListed]
    next_cursor: UUID | None = Field(description="give it as `cursor` for the next page; null on the last")


class CancelOut(BaseModel):
    """The run after the request."""

    id: UUID
    state: RunState


_EXAMPLES = {
    "a named workflow": {"workflow": "support-triage", "inputs": {"message": "My parcel has not arrived."}},
    "a definition": {
        "definition": {
            "workflow": "haiku",
            "inputs": {"subject": {"type": "string"}},
            "steps": [
                {
                    "id": "write",
                    "kind": "generate",
                    "model": "smollm2:135m",
                    "prompt": "Write a haiku about {{ inputs.subject }}.",
                    "max_tokens": 40,
                }
            ],
        },
        "inputs": {"subject": "llamas"},
    },
}


@router.post(
    "",
    status_code=202,
    summary="Submit a run",
    responses=problems.documented(
        404,
        409,
        413,
        415,
        422,
        besides={200: {"model": RunOut, "description": "The run that this Idempotency-Key gave before"}},
    ),
    openapi_extra=bodies.documented({"$ref": "#/components/schemas/RunIn"}, _EXAMPLES),
)
def submit(
    body: Body,
    services: Use,
    response: Response,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> RunOut:
    """
    Write a run and send its first steps; 202 with the run, which goes on by itself.

    The same `Idempotency-Key` with the same content gives the same run, with 200; with another content, 409.
    """
    submission = replace(_submission(_parsed(body), services), idempotency_key=idempotency_key)
    accepted = services.runs.submit(submission)
    response.status_code = 202 if accepted.created else 200
    response.headers["Location"] = f"/v1/runs/{accepted.id}"
    return _out(views.run(services.database, accepted.id))


@router.get("", summary="List runs", responses=problems.documented(422))
def page(
    services: Use,
    state: Annotated[list[RunState] | None, Query(description="one or more states")] = None,
    workflow: Annotated[str | None, Query(description="runs of this workflow only")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[UUID | None, Query(description="`next_cursor` of the page before")] = None,
) -> PageOut:
    """Runs from the newest to the oldest."""
    found = views.page(services.database, limit=limit, before=cursor, states=state, workflow=workflow)
    runs = [RunListed.model_validate(row, from_attributes=True) for row in found.runs]
    return PageOut(runs=runs, next_cursor=found.next_cursor)


@router.get("/{run_id}", summary="One run", responses=problems.documented(404, 422))
def get(run_id: UUID, services: Use) -> RunOut:
    """A run with its steps, their attempts, times and tokens."""
    return _out(views.run(services.database, run_id))


@router.post("/{run_id}/cancel", status_code=202, summary="Cancel a run", responses=problems.documented(404, 422))
def cancel(run_id: UUID, services: Use) -> CancelOut:
    """
    Ask a run to end.

    Steps that have not begun are cancelled at once; those that run stop at their next token, until then the state is
    `cancelling`. A run that has ended stays as it is.
    """
    return CancelOut(id=run_id, state=services.runs.cancel(run_id))


def known_models(services: Services) -> Catalogued:
    """The names that a definition may ask for."""
    return Catalogued(frozenset(model.name for model in services.catalog.models))


def _parsed(body: Source) -> tuple[RunIn, Source]:
    try:
        return RunIn.model_validate(body.data), body
    except ValidationError as error:
        found = []
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"] if part not in {"str", "dict[str,any]"})
            message = "there is no such field here" if item["type"] == "extra_forbidden" else item["msg"]
            accepted = ", ".join(RunIn.model_fields) if item["type"] == "extra_forbidden" else ""
            found.append(Problem(where, message, accepted, body.line(where)))
        raise InvalidInput(found, "run") from None


def _submission(parsed: tuple[RunIn, Source], services: Services) -> Submission:
    asked, body = parsed
    if (asked.workflow is None) == (asked.definition is None):
        message = "a run has either 'workflow', a name, or 'definition'"
        raise InvalidInput([Problem("workflow", message, "one of the two")], "run")
    if asked.workflow is not None:
        found = registry.get(services.database, asked.workflow, asked.version)
        return Submission(found.definition, asked.inputs, found.version, asked.priority)
    if asked.version is not None:
        raise InvalidInput(
            [Problem("version", "a definition given here has no version", "only with 'workflow'")], "run"
        )
    return Submission(_inline(asked, body, services), asked.inputs, None, asked.priority)


def _inline(asked: RunIn, body: Source, services: Services) -> Definition:
    models = known_models(services)
    if isinstance(asked.definition, str):
        return check.parse(asked.definition, models)
    inner = {
        path.removeprefix("definition."): line for path, line in body.lines.items() if path.startswith("definition.")
    }
    return check.check(Source(asked.definition, inner), models)


def _out(view: RunView) -> RunOut:
    run, steps = view.run, [_step(step, view.attempts[step.id]) for step in view.steps]
    return RunOut(
        id=run.id,
        workflow=run.workflow,
        version=run.version,
        state=run.state,
        priority=run.priority,
        inputs=run.inputs,
        output=run.output,
        error=run.error,
        idempotency_key=run.idempotency_key,
        created_at=run.created_at,
        started_at=run.started_at,
        finished_at=run.finished_at,
        took_s=_seconds(run.created_at, run.finished_at),
        tokens_in=sum(step.tokens_in for step in steps),
        tokens_out=sum(step.tokens_out for step in steps),
        steps=steps,
    )


def _step(step: Any, attempts: Sequence[Any]) -> StepOut:
    tried = [
        AttemptOut(
            attempt=row.attempt,
            worker=row.owner,
            **{name: getattr(row, name) for name in AttemptOut.model_fields if name not in {"attempt", "worker"}},
        )
        for row in attempts
    ]
    same = ("id", "key", "kind", "model", "state", "attempt", "output", "error", "tokens_in", "tokens_out")
    return StepOut(
        **{name: getattr(step, name) for name in (*same, "ready_at", "started_at", "finished_at")},
        worker=step.owner,
        next_attempt_at=step.not_before,
        waited_s=_seconds(step.ready_at, step.started_at),
        took_s=_seconds(step.started_at, step.finished_at),
        attempts=tried,
    )


def _seconds(begin: datetime | None, end: datetime | None) -> float | None:
    return None if begin is None or end is None else round((end - begin).total_seconds(), 3)

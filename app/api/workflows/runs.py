"""The resource `runs`: submit, show, list and cancel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any
from uuid import UUID

from fastapi import Header, Query, Response
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from app.access.callers import Caller, KeyScope
from app.api import bodies, problems
from app.api.admission import admit_submission, refuse_shed
from app.api.bodies import RequestBody
from app.api.callers import InjectedCaller, ListedNamespace, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.api.workflows.run_documents import ItemsOut, RunListed, RunOut, item_out, live_of, out
from app.api.workflows.run_ids import ResolvedRunId
from app.kernel.errors import InvalidInput, Problem
from app.kernel.security.egress import EgressPolicy
from app.kernel.units.durations import Duration
from app.workflows import registry
from app.workflows.language import check, source
from app.workflows.language.check import Deployment
from app.workflows.language.definition import LABEL, Definition, LabelValue, PriorityName
from app.workflows.language.overrides import with_models
from app.workflows.language.source import SourceDocument
from app.workflows.runs import views
from app.workflows.runs.submission import Submission
from app.workflows.state_machine.states import RunState, StepState

router = ApiRouter(prefix="/v1/runs", tags=["runs"], dependencies=[requires(KeyScope.READ)])


class RunIn(BaseModel):
    """A submission: a named workflow or a definition, with inputs."""

    model_config = ConfigDict(extra="forbid")

    workflow: str | None = Field(
        default=None,
        pattern=r"^[^\x00]*$",
        max_length=200,
        description="the name of a workflow",
        examples=["support-triage"],
    )
    version: int | None = Field(default=None, ge=0, description="of the named workflow; by default the newest")
    definition: dict[str, Any] | str | None = Field(
        default=None, description="a workflow as an object, or as YAML or JSON in a text"
    )
    models: dict[str, Annotated[str, Field(max_length=64)]] = Field(
        default={},
        max_length=1_000,
        description="by id of a step, the model that it uses instead of its own; `*` is every step that uses one",
        examples=[{"*": "smollm2:135m"}],
    )
    inputs: dict[str, Any] = Field(default={}, examples=[{"message": "Where is my parcel?"}])
    priority: PriorityName | None = Field(default=None, description="instead of the workflow's own")
    rank: int | None = Field(default=None, ge=0, le=2, description="the order within the class: 0 before 1 before 2")
    labels: dict[Annotated[str, Field(pattern=LABEL)], LabelValue] = Field(
        default={}, max_length=32, description="in addition to those of the workflow"
    )
    deadline: Duration | None = Field(default=None, description="for the whole run, instead of the workflow's own")
    retention: Duration | None = Field(default=None, description="how long the run is kept after its end")


class PageOut(BaseModel):
    """A page of runs, the newest first."""

    runs: list[RunListed]
    next_cursor: UUID | None = Field(description="the value of `cursor` for the next page; null on the last page")


class CancelOut(BaseModel):
    """The run after the request."""

    id: UUID
    state: RunState


_EXAMPLES = {
    "a named workflow": {"workflow": "support-triage", "inputs": {"message": "My parcel has not arrived."}},
    "a definition": {
        "definition": {
            "workflow": "title",
            "inputs": {"text": {"type": "string"}},
            "steps": [
                {
                    "id": "write",
                    "kind": "generate",
                    "model": "smollm2:135m",
                    "prompt": "Write a title for: {{ inputs.text }}",
                    "max_tokens": 40,
                }
            ],
        },
        "inputs": {"text": "The hut opened on 1 June, nine days later than last year."},
    },
}


@router.post(
    "",
    status_code=202,
    dependencies=[requires(KeyScope.SUBMIT)],
    summary="Submit a run",
    response_model=RunOut,
    responses=problems.documented(
        402,
        404,
        409,
        413,
        415,
        422,
        429,
        others={200: {"model": RunOut, "description": "The earlier run with this Idempotency-Key"}},
    ),
    openapi_extra=bodies.documented({"$ref": "#/components/schemas/RunIn"}, _EXAMPLES),
)
def submit(
    body: RequestBody,
    services: InjectedServices,
    caller: InjectedCaller,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> Response:
    """
    Store a run and dispatch its first steps; 202 with the run, without waiting for it.

    The same `Idempotency-Key` with the same content returns the same run, with 200; with other content, 409.
    """
    submission = replace(_submission(_parsed(body), services, caller), idempotency_key=idempotency_key)
    refuse_shed(services, submission.priority or submission.definition.rank()[0])
    limits = admit_submission(
        services, caller, caller.namespace_of({**submission.definition.labels, **submission.labels})
    )
    accepted = services.runs.submit(submission)
    view = views.run(services.database, accepted.id, services.settings.api.max_inline_bytes)
    shown = out(view, predictions=services.predictions, sees_fleet=caller.namespace is None)
    # Serialized here: FastAPI would do it on a thread again, queued behind all submissions that arrived meanwhile.
    return Response(
        shown.model_dump_json(by_alias=True),
        status_code=202 if accepted.created else 200,
        headers={"Location": f"/v1/runs/{accepted.id}", **limits},
        media_type="application/json",
    )


@router.get("", summary="List runs", responses=problems.documented(422))
def page(
    services: InjectedServices,
    namespace: ListedNamespace,
    state: Annotated[list[RunState] | None, Query(description="one or more states")] = None,
    workflow: Annotated[str | None, Query(description="runs of this workflow only")] = None,
    label: Annotated[list[str] | None, Query(description="`key=value`, all of them")] = None,
    created_after: Annotated[AwareDatetime | None, Query(description="submitted at this instant or later")] = None,
    created_before: Annotated[AwareDatetime | None, Query(description="submitted before this instant")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[UUID | None, Query(description="`next_cursor` of the previous page")] = None,
) -> PageOut:
    """Runs from the newest to the oldest."""
    found = views.page(
        services.database,
        limit=limit,
        before=cursor,
        states=state,
        workflow=workflow,
        labels=labels_of(label),
        created_after=created_after,
        created_before=created_before,
        namespace=namespace,
    )
    runs = [RunListed.model_validate(row, from_attributes=True) for row in found.runs]
    return PageOut(runs=runs, next_cursor=found.next_cursor)


@router.get("/{run_id}", summary="One run", responses=problems.documented(404, 422))
def get(run_id: ResolvedRunId, services: InjectedServices, caller: InjectedCaller) -> RunOut:
    """
    A run with its steps, their attempts, times and tokens.

    The setting `api.max_inline_bytes` limits the size of the inputs, of the output, and of the steps' outputs together;
    the shortest are included first. A value that does not fit is replaced by `{"$payload": {"bytes": …, "href": …}}`,
    and a GET of `href` returns it.
    """
    view = views.run(services.database, run_id, services.settings.api.max_inline_bytes)
    live = live_of(view, services.database, services.publisher)
    return out(view, live, services.predictions, sees_fleet=caller.namespace is None)


@router.get("/{run_id}/steps/{key}/items", summary="Items of a map", responses=problems.documented(404, 422))
def items(
    run_id: ResolvedRunId,
    key: str,
    services: InjectedServices,
    first: Annotated[int, Query(ge=0, description="the index of the first item")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    state: Annotated[list[StepState] | None, Query(description="one or more states")] = None,
) -> ItemsOut:
    """Items of a map in order, with their values and outputs; long ones are replaced as in a run."""
    max_bytes = services.settings.api.max_inline_bytes
    rows = views.items(services.database, run_id, key, first=first, limit=limit + 1, states=state, most=max_bytes)
    found = [item_out(row, run_id) for row in rows[:limit]]
    return ItemsOut(items=found, next_first=rows[limit].item if len(rows) > limit else None)


@router.post(
    "/{run_id}/cancel",
    status_code=202,
    dependencies=[requires(KeyScope.SUBMIT)],
    summary="Cancel a run",
    responses=problems.documented(404, 422),
)
def cancel(run_id: ResolvedRunId, services: InjectedServices) -> CancelOut:
    """
    Request the end of a run.

    Steps that have not started are cancelled at once. Running steps stop at their next token; until then the state is
    `cancelling`. A run that has ended does not change.
    """
    return CancelOut(id=run_id, state=services.runs.cancel(run_id))


def labels_of(given: Sequence[str] | None) -> dict[str, str]:
    """Parse labels of a query, `key=value`. Raises InvalidInput."""
    invalid = [text for text in given or () if "=" not in text]
    if invalid:
        raise InvalidInput([Problem("label", f"{text!r} is not a label", "key=value") for text in invalid], "query")
    return {key: value for key, _, value in (text.partition("=") for text in given or ())}


def deployment_of(services: Services) -> Deployment:
    """Return the models and the servers that a definition may use."""
    http = services.settings.http
    policy = EgressPolicy.of(http.allowed_hosts, allow_private=http.allow_private)
    return Deployment(services.catalog, policy)


def _parsed(body: SourceDocument) -> tuple[RunIn, SourceDocument]:
    try:
        return RunIn.model_validate(body.data), body
    except ValidationError as error:
        found = []
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"] if part not in {"str", "dict[str,any]"})
            unknown = item["type"] == "extra_forbidden"
            message = "unknown field" if unknown else problems.message_of(item["type"], item["msg"])
            accepted = ", ".join(RunIn.model_fields) if unknown else ""
            found.append(Problem(where, message, accepted, body.line(where)))
        raise InvalidInput(found, "run") from None


def _submission(parsed: tuple[RunIn, SourceDocument], services: Services, caller: Caller) -> Submission:
    request, body = parsed
    labels = caller.labels(request.labels)
    if (request.workflow is None) == (request.definition is None):
        message = "exactly one of 'workflow' and 'definition' is required"
        raise InvalidInput([Problem("workflow", message, "'workflow' with a name, or 'definition'")], "run")
    if request.workflow is not None:
        found = registry.get(
            services.database, request.workflow, request.version, namespace=caller.namespace_of(labels)
        )
        if request.models:  # another definition than that version
            document = with_models(SourceDocument(found.definition.document(), {}), request.models)
            changed = _submission_of(request, labels, check.check(document, deployment_of(services)), None)
            return replace(changed, newest=request.version is None, models=request.models)
        submission = _submission_of(request, labels, found.definition, found.version)
        return replace(submission, newest=request.version is None)
    if request.version is not None:
        raise InvalidInput(
            [Problem("version", "'version' is set together with 'definition'", "only with 'workflow'")], "run"
        )
    return _submission_of(request, labels, _inline(request, body, services), None)


def _submission_of(
    request: RunIn, labels: Mapping[str, str], definition: Definition, version: int | None
) -> Submission:
    return Submission(
        definition,
        request.inputs,
        version,
        request.priority,
        rank=request.rank,
        labels=labels,
        deadline=request.deadline,
        retention=request.retention,
    )


def _inline(request: RunIn, body: SourceDocument, services: Services) -> Definition:
    deployment = deployment_of(services)
    text = request.definition
    document = source.read(text) if isinstance(text, str) else body.within("definition")
    return check.check(with_models(document, request.models) if request.models else document, deployment)

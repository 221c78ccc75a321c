"""The resource `batches` in OpenAI's form: the requests of a file, done while models are idle."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Literal

from fastapi import Query, Response
from pydantic import BaseModel, ConfigDict, Field, field_validator

from app.access.callers import KeyScope
from app.api import bodies
from app.api.admission import admit_submission, refuse_shed
from app.api.callers import InjectedCaller, requires
from app.api.openai import errors
from app.api.openai.errors import OpenAIRoute
from app.api.openai.files import instant
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.files.file import shown_id
from app.inference.batches import service
from app.inference.batches.batch import PREFIX, BatchState
from app.inference.batches.endpoints import ENDPOINTS
from app.inference.batches.rows import StoredBatch
from app.inference.batches.service import NewBatch
from app.inference.openai.generation import PlainText
from app.kernel.units import durations

router = ApiRouter(
    prefix="/v1/batches",
    tags=["openai"],
    dependencies=[requires(KeyScope.SUBMIT, KeyScope.READ)],
    route_class=OpenAIRoute,
)

#: Bounds of the completion window.
_SHORTEST, _LONGEST = timedelta(minutes=1), timedelta(days=31)


class OutputExpiry(BaseModel):
    """When the results of a batch are removed."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3_600, le=2_592_000)


class BatchIn(BaseModel):
    """A new batch. Unknown fields are ignored, as clients of OpenAI's API expect."""

    model_config = ConfigDict(extra="ignore")

    input_file_id: Annotated[PlainText, Field(max_length=100)]
    endpoint: str = Field(max_length=100, examples=["/v1/chat/completions"])
    completion_window: str = Field(
        max_length=32, description="the time for all its requests, such as `24h` or `30m`", examples=["24h"]
    )
    metadata: (
        Annotated[
            dict[Annotated[PlainText, Field(max_length=64)], Annotated[PlainText, Field(max_length=512)]],
            Field(max_length=16),
        ]
        | None
    ) = None
    output_expires_after: OutputExpiry | None = None

    @field_validator("endpoint")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in ENDPOINTS:
            raise ValueError(f"{value!r} cannot be used in a batch; accepted: {', '.join(ENDPOINTS)}")
        return value

    @field_validator("completion_window")
    @classmethod
    def _is_a_window(cls, value: str) -> str:
        if not _SHORTEST <= durations.parse(value) <= _LONGEST:
            shortest, longest = durations.show(_SHORTEST), durations.show(_LONGEST)
            raise ValueError(f"{value!r} is not between {shortest} and {longest}")
        return value


class BatchErrorOut(BaseModel):
    """What is wrong with a line of the input file."""

    code: str = Field(examples=["duplicate_custom_id"])
    line: int | None = Field(description="counted from 1; null for the file")
    message: str
    param: str | None = Field(description="the field that is wrong", examples=["body.messages"])


class BatchErrorsOut(BaseModel):
    """Why a batch has failed: at most a hundred errors."""

    object: Literal["list"] = "list"
    data: list[BatchErrorOut]


class RequestCountsOut(BaseModel):
    """The requests of a batch, while they are done."""

    total: int
    completed: int
    failed: int


class BatchOut(BaseModel):
    """A batch. Its run, `arriero runs show`, has the same id in another form: `run_id` is Arriero's."""

    id: str = Field(examples=["batch_0199a3c2d6f47a0b8c1d2e3f4a5b6c7d"])
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None = Field(description="its model, where it has one")
    errors: BatchErrorsOut | None
    input_file_id: str
    completion_window: str
    status: BatchState
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCountsOut
    metadata: Mapping[str, str] | None
    run_id: str


class BatchListOut(BaseModel):
    """A part of the list of batches."""

    object: Literal["list"] = "list"
    data: list[BatchOut]
    first_id: str | None
    last_id: str | None
    has_more: bool


@router.post(
    "",
    summary="Create a batch",
    dependencies=[requires(KeyScope.SUBMIT)],
    responses=errors.documented(400, 409, 413, 415, 429, 503),
    openapi_extra=bodies.documented_as(BatchIn),
)
def create(
    services: InjectedServices,
    caller: InjectedCaller,
    body: Annotated[BatchIn, bodies.of(BatchIn)],
    response: Response,
) -> BatchOut:
    """
    Begin a batch. Its file is checked first: with an invalid line nothing is done, and the batch is `failed`.

    It counts as one request against the limits of its caller.
    Its requests use slots that nothing more urgent needs, and go on after a crash of any process.
    """
    expiry = body.output_expires_after
    request = NewBatch(
        body.endpoint,
        body.input_file_id,
        body.completion_window,
        durations.parse(body.completion_window),
        body.metadata,
        None if expiry is None else timedelta(seconds=expiry.seconds),
    )
    max_open = services.settings.batches.max_open
    refuse_shed(services, "batch")
    response.headers.update(admit_submission(services, caller, caller.namespace_of({})))
    return out(service.create(services.database, services.publisher, request, caller.namespace, max_open))


@router.get("", summary="Batches", responses=errors.documented(400, 404, 503))
def page(
    services: InjectedServices,
    caller: InjectedCaller,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(description="the id of the last batch of the part before")] = None,
) -> BatchListOut:
    """The batches, the newest first."""
    found = service.page(services.database, caller.namespace, after, limit)
    data = [out(batch) for batch in found.batches]
    first_id, last_id = (data[0].id, data[-1].id) if data else (None, None)
    return BatchListOut(data=data, first_id=first_id, last_id=last_id, has_more=found.has_more)


@router.get("/{batch_id}", summary="A batch", responses=errors.documented(400, 404, 503))
def get(batch_id: str, services: InjectedServices, caller: InjectedCaller) -> BatchOut:
    """A batch. `request_counts` is its progress at this moment."""
    return out(service.get(services.database, batch_id, caller.namespace))


@router.post(
    "/{batch_id}/cancel",
    summary="Cancel a batch",
    dependencies=[requires(KeyScope.SUBMIT)],
    responses=errors.documented(400, 404, 409, 415, 503),
)
def cancel(batch_id: str, services: InjectedServices, caller: InjectedCaller) -> BatchOut:
    """
    Cancel a batch. It is `cancelling` until its requests in progress have stopped.

    The answers so far are in its output file, all other requests in its error file.
    """
    return out(service.cancel(services.database, services.publisher, batch_id, caller.namespace))


def out(batch: StoredBatch) -> BatchOut:
    """Return a batch in OpenAI's form."""
    models = batch.models or []
    return BatchOut(
        id=shown_id(batch.id, PREFIX),
        endpoint=batch.endpoint,
        model=models[0] if len(models) == 1 else None,
        errors=batch.errors and BatchErrorsOut(data=[BatchErrorOut(**error) for error in batch.errors]),
        input_file_id=shown_id(batch.input_file_id),
        completion_window=batch.completion_window,
        status=BatchState(batch.state),
        output_file_id=batch.output_file_id and shown_id(batch.output_file_id),
        error_file_id=batch.error_file_id and shown_id(batch.error_file_id),
        created_at=int(batch.created_at.timestamp()),
        in_progress_at=instant(batch.in_progress_at),
        expires_at=int(batch.expires_at.timestamp()),
        finalizing_at=instant(batch.finalizing_at),
        completed_at=instant(batch.completed_at),
        failed_at=instant(batch.failed_at),
        expired_at=instant(batch.expired_at),
        cancelling_at=instant(batch.cancelling_at),
        cancelled_at=instant(batch.cancelled_at),
        request_counts=RequestCountsOut(total=batch.total, completed=batch.completed, failed=batch.failed),
        metadata=batch.metadata,
        run_id=str(batch.id),
    )

"""Payloads: resources for whole inputs and outputs, and the reference that replaces a long value in other answers."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote
from uuid import UUID

from fastapi.responses import StreamingResponse

from app.access.callers import KeyScope
from app.api import problems
from app.api.callers import requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.api.workflows.run_ids import ResolvedRunId
from app.workflows.runs import views
from app.workflows.runs.details import Elsewhere

router = ApiRouter(prefix="/v1/runs/{run_id}", tags=["runs"], dependencies=[requires(KeyScope.READ)])

#: The only key of the reference that replaces a long value.
MARK = "$payload"

_JSON: Any = {200: {"content": {"application/json": {"schema": {}}}, "description": "The value"}}
_DOCUMENTED: Any = {"response_class": StreamingResponse, "responses": problems.documented(404, 422, others=_JSON)}


def inline_or_reference(value: Any, name: str, run_id: UUID, key: str | None = None) -> Any:
    """Return a value for an answer: the value itself, or a reference when it is too long."""
    if not isinstance(value, Elsewhere):
        return value
    resource = f"/v1/runs/{run_id}" if key is None else f"/v1/runs/{run_id}/steps/{quote(key, safe='')}"
    return {MARK: {"bytes": value.bytes, "href": f"{resource}/{name}"}}


@router.get("/inputs", summary="The inputs of a run", **_DOCUMENTED)
def inputs(run_id: ResolvedRunId, services: InjectedServices) -> StreamingResponse:
    """The whole inputs."""
    return _stream(services, run_id, "inputs")


@router.get("/output", summary="The output of a run", **_DOCUMENTED)
def output(run_id: ResolvedRunId, services: InjectedServices) -> StreamingResponse:
    """The whole output; 404 while there is none."""
    return _stream(services, run_id, "output")


@router.get("/steps/{key}/input", summary="The value of an item", **_DOCUMENTED)
def step_input(run_id: ResolvedRunId, key: str, services: InjectedServices) -> StreamingResponse:
    """The whole value of an item of a map (`read[12]`)."""
    return _stream(services, run_id, "input", key)


@router.get("/steps/{key}/output", summary="The output of a step", **_DOCUMENTED)
def step_output(run_id: ResolvedRunId, key: str, services: InjectedServices) -> StreamingResponse:
    """The whole output of a step or an item; the output of a map is the list of its items' outputs."""
    return _stream(services, run_id, "output", key)


def _stream(services: InjectedServices, run_id: UUID, name: str, key: str | None = None) -> StreamingResponse:
    return StreamingResponse(views.text_of(services.database, run_id, name, key), media_type="application/json")

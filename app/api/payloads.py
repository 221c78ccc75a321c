"""Payloads: inputs and outputs by themselves, and what stands in the place of a long one."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote
from uuid import UUID

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from app.api import problems
from app.api.services import Use
from app.workflows.runs import views
from app.workflows.runs.views import Elsewhere

router = APIRouter(prefix="/v1/runs/{run_id}", tags=["runs"])

#: The only key of what stands in the place of a long value.
MARK = "$payload"

_JSON: Any = {200: {"content": {"application/json": {"schema": {}}}, "description": "The value"}}
_DOCUMENTED: Any = {"response_class": StreamingResponse, "responses": problems.documented(404, 422, besides=_JSON)}


def shown(value: Any, name: str, run_id: UUID, key: str | None = None) -> Any:
    """A value as it stands in an answer."""
    if not isinstance(value, Elsewhere):
        return value
    of = f"/v1/runs/{run_id}" if key is None else f"/v1/runs/{run_id}/steps/{quote(key, safe='')}"
    return {MARK: {"bytes": value.bytes, "href": f"{of}/{name}"}}


@router.get("/inputs", summary="The inputs of a run", **_DOCUMENTED)
def inputs(run_id: UUID, services: Use) -> StreamingResponse:
    """The inputs, however long they are."""
    return _stream(services, run_id, "inputs")


@router.get("/output", summary="The output of a run", **_DOCUMENTED)
def output(run_id: UUID, services: Use) -> StreamingResponse:
    """The output, however long it is; 404 while there is none."""
    return _stream(services, run_id, "output")


@router.get("/steps/{key}/input", summary="The value of an item", **_DOCUMENTED)
def step_input(run_id: UUID, key: str, services: Use) -> StreamingResponse:
    """The value of an item of a map (`read[12]`), however long it is."""
    return _stream(services, run_id, "input", key)


@router.get("/steps/{key}/output", summary="The output of a step", **_DOCUMENTED)
def step_output(run_id: UUID, key: str, services: Use) -> StreamingResponse:
    """The output of a step or an item, however long it is; that of a map is the list of its items' outputs."""
    return _stream(services, run_id, "output", key)


def _stream(services: Use, run_id: UUID, name: str, key: str | None = None) -> StreamingResponse:
    return StreamingResponse(views.text_of(services.database, run_id, name, key), media_type="application/json")

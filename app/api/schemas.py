"""The resource `schemas`: the JSON Schema of a workflow, for editors and other programs."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from app.api import problems
from app.api.callers import OPEN
from app.api.routers import ApiRouter
from app.workflows.language import schema

router = ApiRouter(prefix="/v1/schemas", tags=["schemas"], dependencies=[OPEN])

#: The media type of a JSON Schema.
MEDIA_TYPE = "application/schema+json"


class _SchemaResponse(JSONResponse):
    media_type = MEDIA_TYPE


@router.get(
    "/workflow",
    summary="The JSON Schema of a workflow",
    response_class=_SchemaResponse,
    responses=problems.documented(),
)
async def workflow() -> dict[str, Any]:
    """Draft 2020-12. Rules that a schema cannot express are checked when a workflow is stored or submitted."""
    return dict(schema.workflow())

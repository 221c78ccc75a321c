"""Query parameters: a request with one that its endpoint does not have is refused, and nothing is silently ignored."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from fastapi import Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from pydantic import BaseModel

from app.kernel.errors import InvalidInput, Problem


async def refuse_unknown(request: Request) -> None:
    """Raise InvalidInput when a query parameter is not one of the endpoint."""
    route = request.scope.get("route")
    if not request.query_params or not isinstance(route, APIRoute):
        return
    known = sorted(_names(route.dependant))
    unknown = sorted(set(request.query_params) - set(known))
    if unknown:
        accepted = f"one of {', '.join(known)}" if known else "no query parameters"
        raise InvalidInput([Problem(f"query.{name}", "unknown query parameter", accepted) for name in unknown], "query")


def _names(dependant: Dependant) -> Iterator[str]:
    for parameter in dependant.query_params:
        model = parameter.field_info.annotation
        if inspect.isclass(model) and issubclass(model, BaseModel):
            yield from (field.alias or name for name, field in model.model_fields.items())
        else:
            yield parameter.alias
    for other in dependant.dependencies:
        yield from _names(other)

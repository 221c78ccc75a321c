"""What the OpenAPI document says of access: the scheme of the keys, the scopes of each operation, and the refusals."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute, iter_route_contexts

from app.access import keys
from app.api import problems
from app.api.callers import Requirement, requirement_of
from app.api.openai import errors

#: The name of the scheme.
_SCHEME = "apiKey"
_HEADERS = {"WWW-Authenticate": {"schema": {"type": "string"}}}


def describe(app: FastAPI, document: dict[str, Any]) -> None:
    """Add to the OpenAPI document which scopes each operation needs, and its refusals."""
    document["components"]["securitySchemes"] = {
        _SCHEME: {
            "type": "http",
            "scheme": "bearer",
            "description": f"An API key, `{keys.PREFIX}…`. Programs on the machine of the API need none by default.",
        }
    }
    for context in iter_route_contexts(app.routes):
        route = context.original_route
        requirement = requirement_of(route)
        path = document["paths"].get(context.path_format)
        if isinstance(route, APIRoute) and requirement is not None and requirement.any_of and path is not None:
            for method in context.methods or ():
                content = errors.CONTENT if isinstance(route, errors.OpenAIRoute) else problems.CONTENT
                _describe(path[method.lower()], requirement, content)


def _describe(operation: dict[str, Any], requirement: Requirement, content: dict[str, Any]) -> None:
    scopes = " or ".join(f"`{scope}`" for scope in sorted(requirement.any_of))
    needed = f"Needs a key with the scope {scopes}{', for all namespaces' if requirement.all_namespaces else ''}."
    operation["description"] = f"{operation.get('description', '')}\n\n{needed}".strip()
    operation["security"] = [{_SCHEME: []}]
    for status, what in (
        ("401", "A key is needed, and there is none or it is not valid"),
        ("403", f"No permission. {needed}"),
    ):
        operation["responses"][status] = {"description": what, "headers": _HEADERS, "content": content}

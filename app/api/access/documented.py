"""What the OpenAPI document says of access: the scheme of the keys, the scopes of each operation, and all refusals."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute, iter_route_contexts

from app.access import keys
from app.api.callers import Requirement, requirement_of
from app.api.error_forms import CONTENTS, INVALID, form_of

#: The name of the scheme.
_SCHEME = "apiKey"
#: Why an operation that needs no key refuses one.
_OTHER_SITE = "A web page of another site may have sent the request, or it is for a server with another name"
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
        path = document["paths"].get(context.path_format)
        if isinstance(route, APIRoute) and path is not None:
            for method in context.methods or ():
                _describe(path[method.lower()], method, route)


def _describe(operation: dict[str, Any], method: str, route: APIRoute) -> None:
    form, requirement, answers = form_of(route), requirement_of(route), operation["responses"]
    content = CONTENTS[form]
    if INVALID[form] != 422:
        answers.pop("422", None)  # FastAPI adds it
    if requirement is not None and requirement.any_of:
        _describe_access(operation, requirement, content)
    refusals = {INVALID[form]: "The request is invalid", 403: _OTHER_SITE, 431: "The request has too many headers"}
    if "{" in route.path:
        refusals[404] = "There is nothing of this name, or it has a slash"
    if method != "GET":
        refusals |= {413: "The body is too large", 415: "The media type of the body is not supported"}
    for status, what in refusals.items():
        answers.setdefault(str(status), {"description": what, "content": content})


def _describe_access(operation: dict[str, Any], requirement: Requirement, content: dict[str, Any]) -> None:
    scopes = " or ".join(f"`{scope}`" for scope in sorted(requirement.any_of))
    needed = f"Needs a key with the scope {scopes}{', for all namespaces' if requirement.all_namespaces else ''}."
    operation["description"] = f"{operation.get('description', '')}\n\n{needed}".strip()
    operation["security"] = [{_SCHEME: []}]
    for status, what in (
        ("401", "A key is needed, and there is none or it is not valid"),
        ("403", f"No permission. {needed}"),
    ):
        operation["responses"][status] = {"description": what, "headers": _HEADERS, "content": content}

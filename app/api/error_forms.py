"""
The form of an error: that of the interface to which the path of its request belongs.

Errors of an endpoint are translated by the class of its route (`OpenAIRoute`, `OllamaRoute`). What is refused before a
request reaches an endpoint, and what such a class does not know, gets its form here: that of the route with this path,
whatever the method, or else that of all routes which begin alike. All other errors are problem details.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from enum import StrEnum

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.routing import BaseRoute

from app.api import problems
from app.api.ollama import errors as ollama
from app.api.openai import errors as openai
from app.kernel.errors import ArrieroError


class ErrorForm(StrEnum):
    """The form of the errors of an interface."""

    PROBLEM = "problem"
    OPENAI = "openai"
    OLLAMA = "ollama"


#: The content of an error of each form in the OpenAPI document.
CONTENTS = {
    ErrorForm.PROBLEM: problems.CONTENT,
    ErrorForm.OPENAI: openai.CONTENT,
    ErrorForm.OLLAMA: ollama.CONTENT,
}
#: The status of invalid input in each form.
INVALID = {ErrorForm.PROBLEM: 422, ErrorForm.OPENAI: 400, ErrorForm.OLLAMA: 400}


def form_of(route: BaseRoute) -> ErrorForm:
    """Return the form of the errors of a route."""
    if isinstance(route, ollama.OllamaRoute):
        return ErrorForm.OLLAMA
    return ErrorForm.OPENAI if isinstance(route, openai.OpenAIRoute) else ErrorForm.PROBLEM


class ErrorForms:
    """Errors in the form of the interface to which a path belongs."""

    def __init__(self, routers: Iterable[APIRouter]) -> None:
        self._paths: list[tuple[re.Pattern[str], ErrorForm]] = []
        beginnings: defaultdict[str, set[ErrorForm]] = defaultdict(set)
        for router in routers:
            for context in iter_route_contexts(router.routes):
                route = context.original_route
                if isinstance(route, APIRoute):
                    self._paths.append((route.path_regex, form_of(route)))
                    beginnings[_beginning(route.path)].add(form_of(route))
        self._beginnings = {begin: next(iter(forms)) for begin, forms in beginnings.items() if len(forms) == 1}

    def at(self, path: str) -> ErrorForm:
        """Return the form for a path, which may be one that no route has."""
        exact = next((form for regex, form in self._paths if regex.match(path)), None)
        return exact or self._beginnings.get(_beginning(path), ErrorForm.PROBLEM)

    def of_error(self, path: str, status: int, error: ArrieroError) -> JSONResponse:
        """Return the answer for an error. Invalid input has the status of the form instead of 422."""
        form = self.at(path)
        if status == 422:
            status = INVALID[form]
        if form is ErrorForm.OPENAI:
            return openai.of_error(status, error)
        return ollama.of_error(status, error) if form is ErrorForm.OLLAMA else problems.of_error(status, error)

    def response(self, path: str, status: int, name: str, title: str, detail: str) -> JSONResponse:
        """Return the answer for what is no error of Arriero; `name` and `title` are parts of problem details."""
        form = self.at(path)
        if form is ErrorForm.OPENAI:
            return openai.response(status, openai.document(detail, status))
        if form is ErrorForm.OLLAMA:
            return ollama.response(status, detail)
        return problems.response(status, name, title, detail)


def _beginning(path: str) -> str:
    """Return the first two segments of a path below `/v1`, else its first one."""
    segments = path.split("/", 3)[1:3]
    return "/".join(segments if segments[0] == "v1" else segments[:1])

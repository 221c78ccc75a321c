"""
The target `openapi`: an operation of an API that an OpenAPI document describes.

The document is a part of the definition; nothing is fetched. Parameters in the path, the query and headers are filled
from fields of the payload with their names, the others are the JSON body. What the document says of both is checked:
the operation must exist, and a payload must have what it requires.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

from pydantic import Field, model_validator

from app.handoffs.connectors.connector import DeliveryPlan, SecretName, TargetFields
from app.handoffs.connectors.http_target import ReadBack
from app.kernel.errors import Problem

_METHODS = ("get", "post", "put", "patch", "delete")
_PLACES = ("path", "query", "header")
_MAX_DOCUMENT = 500_000


@dataclass(frozen=True, slots=True)
class _Operation:
    """What a request needs."""

    path: str
    method: str
    #: Name to place.
    parameters: Mapping[str, str]
    required: frozenset[str]
    has_body: bool


class OpenApiTarget(TargetFields):
    """An operation of an OpenAPI document."""

    kind: Literal["openapi"]
    #: The document (OpenAPI 3), or the part of it that has the operation.
    document: Mapping[str, Any]
    #: Its `operationId`.
    operation: str = Field(min_length=1, max_length=200)
    #: The address of the server, in the place of the document's first one.
    server: str | None = Field(default=None, pattern=r"^https?://[^\s{}]{1,300}$")
    #: The secret that is sent as a bearer token, or in this header.
    token: SecretName | None = None
    token_header: str = Field(default="authorization", pattern=r"^[A-Za-z0-9-]{1,60}$")
    read_back: ReadBack | None = None

    @model_validator(mode="after")
    def _is_described(self) -> OpenApiTarget:
        if len(json.dumps(self.document)) > _MAX_DOCUMENT:
            raise ValueError(f"'document' has more than {_MAX_DOCUMENT} characters; keep the part with the operation")
        self._found()
        self._server()
        return self

    def problems(self, payload: Mapping[str, Any]) -> list[Problem]:
        """Return what the operation requires and the payload lacks, and what cannot be a part of a path."""
        found = self._found()
        missing = [
            Problem(f"payload.{name}", "the operation requires it") for name in sorted(found.required - payload.keys())
        ]
        accepted = "a number, or a text that is not empty, '.' or '..'"
        return missing + [
            Problem(f"payload.{name}", f"{str(payload[name])[:60]!r} cannot be a part of the path", accepted)
            for name, place in found.parameters.items()
            if place == "path" and name in payload and not _is_part(payload[name])
        ]

    def plan(self, retry: Mapping[str, Any], fields: tuple[str, ...]) -> DeliveryPlan:
        """Return the steps: shape (where there is a body), request, read back."""
        del fields
        found, names = self._found(), json.dumps(sorted(self._found().parameters))
        url = self._server() + found.path
        headers, queried = dict[str, str](), list[str]()
        for name, place in found.parameters.items():
            value = f"inputs.payload[{json.dumps(name)}]"
            if place == "path":
                url = url.replace(f"{{{name}}}", f"{{{{ {value} | urlencode | replace('/', '%2F') }}}}")
            elif place == "query":
                queried.append(
                    f"{{% if {value} is defined %}}&{quote(name)}={{{{ {value} | urlencode }}}}{{% endif %}}"
                )
            else:
                headers[name] = f"{{{{ {value} }}}}"
        url += f"?{''.join(queried)}" if queried else ""
        if self.token is not None:
            bearer = "Bearer " if self.token_header.lower() == "authorization" else ""
            headers[self.token_header] = f"{bearer}{{{{ secrets.{self.token} }}}}"
        steps: list[dict[str, Any]] = []
        deliver: dict[str, Any] = {"id": "deliver", "kind": "http", "url": url, "method": found.method.upper()}
        if found.has_body:
            rest = f"inputs.payload.filter(name, !(name in {names})).map(name, [name, inputs.payload[name]])"
            steps.append({"id": "rest", "kind": "transform", "cel": rest})
            deliver |= {
                "needs": ["rest"],
                "body": "{{ '{' }}{% for one in steps.rest.output %}{{ one[0] | tojson }}: {{ one[1] | tojson }}"
                "{% if not loop.last %}, {% endif %}{% endfor %}{{ '}' }}",
            }
            headers["content-type"] = "application/json"
        deliver |= {"url": url, "headers": headers, "retry": dict(retry)}
        plan = DeliveryPlan([*steps, deliver], {"response": "steps.deliver.output.body"})
        if self.read_back is not None:
            plan.steps.append(self.read_back.step(retry))
            plan.outputs["read"] = self.read_back.value
        return plan

    def _server(self) -> str:
        servers = self.document.get("servers")
        first = servers[0] if isinstance(servers, list) and servers and isinstance(servers[0], Mapping) else {}
        found = self.server or first.get("url")
        if not isinstance(found, str) or not found.startswith(("http://", "https://")) or "{" in found:
            raise ValueError("'document' names no server with an http address; set 'server'")
        return found.rstrip("/")

    def _found(self) -> _Operation:
        known = []
        for path, method, shared, operation in self._operations():
            known.append(str(operation.get("operationId", "")))
            if operation.get("operationId") == self.operation:
                return self._described(path, method, [*_list(shared), *_list(operation.get("parameters"))], operation)
        listed = ", ".join(name for name in known[:30] if name) or "none"
        raise ValueError(f"'document' has no operation {self.operation!r}; it has: {listed}")

    def _operations(self) -> Iterator[tuple[str, str, Any, Mapping[str, Any]]]:
        paths = self.document.get("paths")
        for path, item in paths.items() if isinstance(paths, Mapping) else ():
            for method in _METHODS:
                if isinstance(item, Mapping) and isinstance(operation := item.get(method), Mapping):
                    yield str(path), method, item.get("parameters"), operation

    def _described(self, path: str, method: str, given: list[Any], operation: Mapping[str, Any]) -> _Operation:
        parameters, required = dict[str, str](), set[str]()
        for one in map(self._resolved, given):
            name, place = one.get("name"), one.get("in")
            if isinstance(name, str) and place in _PLACES and 0 < len(name) <= 100 and "{" not in name:
                needed = one.get("required") is True or place == "path"
                if needed or place == "query":  # headers that can be left out are
                    parameters[name] = str(place)
                required |= {name} if needed else set()
        body = self._resolved(operation.get("requestBody"))
        content = body.get("content")
        media = content.get("application/json") if isinstance(content, Mapping) else None
        if body and media is None:
            raise ValueError(f"operation {self.operation!r} takes no application/json")
        schema = self._resolved(media.get("schema")) if isinstance(media, Mapping) else {}
        required |= {name for name in _list(schema.get("required")) if isinstance(name, str)}
        missing = [part for part in _names_in(path) if part not in parameters]
        if missing:
            raise ValueError(f"the path {path!r} has {missing[0]!r}, which is no parameter of the operation")
        return _Operation(path, method, parameters, frozenset(required), bool(body))

    def _resolved(self, part: Any) -> Mapping[str, Any]:
        """Return a part, where its `$ref` leads within the document."""
        for _ in range(8):
            if not isinstance(part, Mapping):
                return {}
            reference = part.get("$ref")
            if reference is None:
                return part
            if not isinstance(reference, str) or not reference.startswith("#/"):
                raise ValueError(f"'$ref': {str(reference)[:100]!r} leads out of the document, which is not followed")
            found: Any = self.document
            for name in reference[2:].split("/"):
                found = found.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
            part = found
        raise ValueError("'document' has references that lead to references without an end")


def _is_part(found: Any) -> bool:
    if isinstance(found, bool) or not isinstance(found, str | int):
        return False
    return str(found) not in ("", ".", "..")


def _list(found: Any) -> list[Any]:
    return found if isinstance(found, list) else []


def _names_in(path: str) -> list[str]:
    return [part.partition("}")[0] for part in path.split("{")[1:]]

"""What is refused before a request reaches an endpoint is answered in the form of its interface, as documented."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from fastapi.testclient import TestClient

from app.api.error_forms import ErrorForm, ErrorForms
from app.api.main import ROUTERS

JSON = {"Content-Type": "application/json"}
#: Paths of each interface; the last of each is the path of no route.
PATHS = {
    ErrorForm.PROBLEM: ("/v1/runs", "/v1/compress", "/v1/catalog/nothing", "/v1/nowhere"),
    ErrorForm.OPENAI: ("/v1/chat/completions", "/v1/responses", "/v1/files", "/v1/models", "/v1/chat/nowhere"),
    ErrorForm.OLLAMA: ("/api/chat", "/api/show", "/api/tags", "/api/nowhere"),
}
EVERY = [(form, path) for form, paths in PATHS.items() for path in paths]
#: Requests that are refused before their endpoint, and the status of the refusal.
REFUSED: dict[str, tuple[dict[str, Any], int]] = {
    "form": ({"content": "{}", "headers": {"Content-Type": "text/plain"}}, 415),
    "long": ({"content": b"x" * 20, "headers": {**JSON, "Content-Length": str(10**12)}}, 413),
    "headers": ({"content": "{}", "headers": {**JSON, **{f"X-{n}": "1" for n in range(120)}}}, 431),
    "nul": ({"content": "{}", "headers": JSON, "params": {"a": "\0"}}, 422),
    "page": ({"content": "{}", "headers": {**JSON, "Origin": "http://evil.example"}}, 403),
    "method": ({}, 405),
}


def form_of(answer: Any) -> ErrorForm:
    body = answer.json()
    if answer.headers["content-type"] == "application/problem+json":
        assert body["status"] == answer.status_code
        assert body["detail"]
        return ErrorForm.PROBLEM
    assert answer.headers["content-type"] == "application/json"
    if isinstance(body["error"], str):
        assert body["error"]
        return ErrorForm.OLLAMA
    assert body["error"]["message"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return ErrorForm.OPENAI


@pytest.mark.parametrize("refused", REFUSED)
def test_refusals_have_the_form_of_their_interface(client: TestClient, refused: str) -> None:
    request, status = REFUSED[refused]
    method = "TRACE" if refused == "method" else "POST"
    for form, path in EVERY:
        answer = client.request(method, path, **request)
        expected = 400 if status == 422 and form is not ErrorForm.PROBLEM else status
        unknown = 404 if refused == "method" and path.endswith("nowhere") else expected
        assert (path, answer.status_code, form_of(answer)) == (path, unknown, form)


@pytest.mark.parametrize("path", ["/v1/runs", "/v1/batches", "/api/show"])
def test_a_body_that_turns_out_too_long_is_refused_in_the_form_of_its_interface(client: TestClient, path: str) -> None:
    answer = client.post(path, content=iter([b"x" * 50_000] * 3), headers=JSON)

    assert answer.status_code == 413
    assert form_of(answer) is ErrorForms(ROUTERS).at(path)


@pytest.mark.parametrize("path", [path for _, path in EVERY if path.endswith("nowhere")])
def test_a_path_of_no_route_is_answered_in_the_form_of_those_that_begin_alike(client: TestClient, path: str) -> None:
    answer = client.get(path)

    assert answer.status_code == 404
    assert form_of(answer) is ErrorForms(ROUTERS).at(path)


def test_every_refusal_is_documented(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    walked = 0
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            url = path.replace("{", "").replace("}", "")
            for request, _ in (REFUSED[one] for one in ("form", "long", "headers", "nul", "page")):
                if method == "get" and "content" in request:
                    request = {"headers": request["headers"], "params": request.get("params")}
                    if "Content-Length" in request["headers"]:
                        continue
                answer = client.request(method, url, **request)
                status = str(answer.status_code)
                if answer.is_success or status not in ("400", "403", "413", "415", "422", "431"):
                    continue  # a GET without a body is no form
                assert status in operation["responses"], (method, path, status)
                media_type = answer.headers["content-type"]
                schema = operation["responses"][status]["content"][media_type]["schema"]
                jsonschema.validate(answer.json(), {**schema, "components": document["components"]})
                walked += 1
    assert walked > 400


def test_openai_operations_document_no_problem_details(client: TestClient) -> None:
    for path, operations in client.get("/openapi.json").json()["paths"].items():
        for operation in operations.values():
            if ErrorForms(ROUTERS).at(path) is not ErrorForm.PROBLEM:
                contents = {media for one in operation["responses"].values() for media in one.get("content", {})}
                assert "application/problem+json" not in contents, path


def test_every_path_with_a_name_documents_that_it_may_not_be_found(client: TestClient) -> None:
    """A name with an encoded slash leads to no route, whatever the route does with names."""
    undocumented = [
        f"{method.upper()} {path}"
        for path, operations in client.get("/openapi.json").json()["paths"].items()
        for method, operation in operations.items()
        if "{" in path and "404" not in operation["responses"]
    ]
    assert undocumented == []

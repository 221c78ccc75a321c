"""Workflows, models, health and the OpenAPI document over HTTP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.api.main import STATUSES, serve, status_of
from app.api.services import Services
from app.kernel import broker, errors
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.sections.servers import BrokerSettings

YAML = """
workflow: rest
description: Nothing, twice.
steps:
  - {id: a, kind: noop}
  - {id: b, kind: join, needs: [a]}
"""


def put(client: TestClient, name: str = "rest", text: str = YAML) -> Any:
    return client.put(f"/v1/workflows/{name}", content=text, headers={"Content-Type": "application/yaml"})


def test_versions_are_kept_and_equal_ones_are_not_stored_twice(client: TestClient) -> None:
    assert put(client).status_code == 201
    assert put(client).status_code == 200, "it is the newest version already"
    changed = put(client, text=YAML.replace("twice", "again"))

    assert (changed.status_code, changed.json()["version"]) == (201, 2)
    assert [entry["version"] for entry in changed.json()["versions"]] == [2, 1]
    assert client.get("/v1/workflows/rest", params={"version": 1}).json()["description"] == "Nothing, twice."


def test_the_shipped_workflow_exists_and_can_be_replaced(client: TestClient) -> None:
    shipped = client.get("/v1/workflows/support-triage").json()
    assert (shipped["version"], shipped["models"]) == (0, ["gemma3:270m"])
    assert "support-triage" in [entry["name"] for entry in client.get("/v1/workflows").json()["workflows"]]

    own = {**shipped["definition"], "description": "ours"}
    assert client.put("/v1/workflows/support-triage", json=own).json()["version"] == 1
    assert client.get("/v1/workflows/support-triage").json()["description"] == "ours"
    assert client.get("/v1/workflows/support-triage", params={"version": 0}).json()["version"] == 0


def test_a_definition_with_another_name_is_rejected(client: TestClient) -> None:
    answer = put(client, name="other")

    assert answer.status_code == 422
    assert answer.json()["errors"][0]["where"] == "workflow"
    assert client.get("/v1/workflows/rest").status_code == 404


def test_an_invalid_definition_names_every_line(client: TestClient) -> None:
    text = YAML + "  - {id: b, kind: noop}\n  - {id: c, kind: generate, model: 'smollm:135m', prompt: x, needs: [z]}\n"
    answer = put(client, text=text)

    found = [(item["where"], item["line"]) for item in answer.json()["errors"]]
    assert found == [("steps[2].id", 7), ("steps[3].needs[0]", 8), ("steps[3].model", 8)]
    assert "smollm2:135m" in answer.json()["errors"][2]["accepted"]


def test_models_have_the_state_of_their_file_and_their_demand(client: TestClient) -> None:
    client.post("/v1/runs", json={"workflow": "support-triage", "inputs": {"message": "hi"}})
    models = {entry["name"]: entry for entry in client.get("/v1/catalog").json()["models"]}

    assert models["smollm2:135m"]["present"] is True
    assert models["gemma3:270m"]["steps_ready"] == 1
    assert models["qwen3:4b"]["present"] is False
    assert "arriero models pull qwen3:4b" in models["qwen3:4b"]["problem"]
    assert client.get("/v1/catalog/smollm2:135m").json() == models["smollm2:135m"]


def test_a_healthy_service_is_ready(client: TestClient) -> None:
    assert client.get("/healthz").json()["status"] == "ok"
    instance = client.get("/healthz").json()["instance"]
    found = client.get("/readyz").json()
    assert (found["ready"], found["instance"], found["database"], found["broker"]) == (True, instance, "ok", "ok")


def test_readiness_names_unavailable_parts(services: Services) -> None:
    nowhere = "redis://127.0.0.1:1/0"
    publisher = CeleryPublisher(broker.celery_app(nowhere, BrokerSettings()), nowhere)
    database = Database("postgresql://arriero@127.0.0.1:1/arriero", pool_size=1)
    cut_off = replace(services, database=database, publisher=publisher)
    client = TestClient(serve(cut_off), base_url="http://localhost", raise_server_exceptions=False)

    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert "is unreachable" in answer.json()["database"]
    assert "is unreachable" in answer.json()["broker"]
    assert client.get("/healthz").status_code == 200
    assert client.get("/v1/runs").headers["retry-after"] == "5"
    publisher.close()
    database.close()


def test_an_internal_error_is_a_problem_without_details(services: Services) -> None:
    app = serve(services)

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError("the password is swordfish")

    answer = TestClient(app, base_url="http://localhost", raise_server_exceptions=False).get("/broken")
    assert answer.status_code == 500
    assert "swordfish" not in answer.text


def test_every_error_has_a_status() -> None:
    def leaves(kind: type[errors.ArrieroError]) -> list[type[errors.ArrieroError]]:
        below = kind.__subclasses__()
        return [leaf for sub in below for leaf in leaves(sub)] if below else [kind]

    for kind in leaves(errors.ArrieroError):
        bare = kind.__new__(kind)
        assert status_of(bare) in STATUSES.values()


@pytest.fixture
def document(client: TestClient) -> Any:
    return client.get("/openapi.json").json()


def test_the_document_resolves_and_describes_errors_and_examples(document: Any) -> None:
    schemas = document["components"]["schemas"]

    def references(node: Any) -> list[str]:
        if isinstance(node, dict):
            own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
            return own + [ref for value in node.values() for ref in references(value)]
        return [ref for item in node for ref in references(item)] if isinstance(node, list) else []

    for ref in references(document):
        assert ref.rpartition("/")[2] in schemas, ref
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], (method, path)
            if operation.get("tags") == ["openai"]:
                assert operation["responses"]["503"]["content"]["application/json"]["schema"] == {
                    "$ref": "#/components/schemas/OpenAIErrorOut"
                }
            elif path.startswith("/v1"):
                assert "application/problem+json" in operation["responses"]["503"]["content"]
    submit = document["paths"]["/v1/runs"]["post"]
    assert set(submit["responses"]) >= {"200", "202", "404", "409", "413", "415", "422"}
    assert submit["requestBody"]["content"]["application/json"]["examples"]
    assert "HTTPValidationError" not in schemas


def test_the_examples_of_the_document_are_accepted(client: TestClient, document: Any) -> None:
    body = document["paths"]["/v1/runs"]["post"]["requestBody"]["content"]["application/json"]
    for example in body["examples"].values():
        assert client.post("/v1/runs", json=example["value"]).status_code == 202

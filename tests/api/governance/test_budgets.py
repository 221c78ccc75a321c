"""Budgets over HTTP: who may set them, what they refuse, and what a namespace sees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.access import key_store, keys
from app.access.callers import LOCAL, KeyScope
from app.access.keys import NewKey
from app.api.main import serve
from app.api.services import Services
from app.kernel import ids
from app.kernel.sections.access import AccessSettings
from tests.governance.costs.conftest import Spend, spend  # noqa: F401 a fixture

RUN = {"definition": {"workflow": "w", "steps": [{"id": "s", "kind": "wait", "for": "1h"}]}}


def put(client: TestClient, name: str, **given: Any) -> Any:
    answer = client.put(f"/v1/budgets/{name}", json={"amount": 2, "hard": True, **given}, params={"namespace": "a"})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_budget_is_set_read_and_removed(client: TestClient, spend: Spend) -> None:  # noqa: F811 as above
    spend("0.5")
    found = put(client, "monthly", period="week", workflow="w", amount="2.50")
    assert found | {"amount": 2.5, "spent": 0.5, "used": 0.2, "period": "week", "currency": "USD"} == found
    assert client.get("/v1/budgets").json()["budgets"] == [found]
    assert client.get("/v1/budgets/monthly", params={"namespace": "a"}).json() == found
    assert client.get("/v1/budgets/monthly").status_code == 404
    assert client.delete("/v1/budgets/monthly", params={"namespace": "a"}).status_code == 204
    assert client.delete("/v1/budgets/monthly", params={"namespace": "a"}).status_code == 404
    audited = [(one["action"], one["target"]) for one in client.get("/v1/audit").json()["entries"]]
    assert audited == [(f"{method} /v1/budgets/{{name}}", {"name": "monthly"}) for method in ("DELETE", "PUT")]


def test_runs_are_refused_with_402(client: TestClient, spend: Spend) -> None:  # noqa: F811 as above
    spend("2")
    put(client, "daily", period="day")
    run = {**RUN, "labels": {"namespace": "a"}}
    refused = client.post("/v1/runs", json=run)
    assert refused.status_code == 402
    assert refused.json()["type"] == "urn:arriero:error:budget-used-up"
    assert "'daily' of the namespace 'a' is used up: 2.000000 of 2 USD in this day" in refused.json()["detail"]
    assert "accepted again at" in refused.json()["detail"]
    assert client.post("/v1/runs", json=RUN).status_code == 202, "another namespace"


def test_a_namespace_sees_its_budgets_and_sets_none(client: TestClient, services: Services) -> None:
    put(client, "ours")
    put_b = client.put("/v1/budgets/theirs", json={"amount": 1}, params={"namespace": "b"})
    assert put_b.status_code == 200
    settings = services.settings.model_copy(update={"access": AccessSettings(keys="required")})
    other = TestClient(serve(replace(services, settings=settings)), base_url="http://localhost")
    headers = {"Authorization": f"Bearer {key(services, 'a')}"}
    assert [one["name"] for one in other.get("/v1/budgets", headers=headers).json()["budgets"]] == ["ours"]
    assert other.get("/v1/budgets/theirs", headers=headers).status_code == 404
    assert other.put("/v1/budgets/ours", json={"amount": 1_000}, headers=headers).status_code == 403
    assert other.delete("/v1/budgets/ours", headers=headers).status_code == 403


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({}, "amount"),
        ({"amount": 0}, "amount"),
        ({"amount": -1}, "amount"),
        ({"amount": "NaN"}, "amount"),
        ({"amount": "Infinity"}, "amount"),
        ({"amount": "1e400"}, "amount"),
        ({"amount": "0.0000001"}, "amount"),
        ({"amount": 1, "period": "year"}, "period"),
        ({"amount": 1, "workflow": "\x00"}, "workflow"),
        ({"amount": 1, "else": 1}, "else"),
    ],
)
def test_an_impossible_budget_is_refused(client: TestClient, body: dict[str, Any], where: str) -> None:
    answer = client.put("/v1/budgets/x", json=body)
    assert answer.status_code == 422
    assert where in answer.json()["errors"][0]["where"]


def key(services: Services, namespace: str) -> str:
    key_id, secret = ids.new_text(keys.ID_CHARACTERS, lower_case=True), ids.new_text(keys.SECRET_CHARACTERS)
    with services.database.work() as work:
        key_store.create(work, LOCAL, NewKey(namespace, namespace, frozenset(KeyScope), None), key_id, secret)
    return keys.compose(key_id, secret)

"""Costs over HTTP: a namespace sees its own, and estimates say what they assume."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fastapi.testclient import TestClient

from app.access import key_store, keys
from app.access.callers import LOCAL, KeyScope
from app.access.keys import NewKey
from app.api.main import serve
from app.api.services import Services
from app.catalog import catalog as catalogs
from app.kernel import ids
from app.kernel.sections.access import AccessSettings
from tests.governance.costs.conftest import Spend, spend  # noqa: F401 a fixture

CATALOG = """
[[models]]
name = "cloud:x"
use_cases = ["chat"]
[models.remote]
url = "https://api.example.com/v1"
model = "x"
allowed = true
cost_in = 1
cost_cached = 0.1
cost_out = 4

[[models]]
name = "local:1"
use_cases = ["chat"]
source = { path = "small.gguf" }
"""


def test_costs_are_told_by_what_they_are_for(client: TestClient, spend: Spend) -> None:  # noqa: F811 as above
    spend("0.25", device_us=1_500_000)
    spend(None, workflow="v", tokens=(0, 0, 0))
    found = client.get("/v1/costs", params={"by": "workflow", "last": "1d"}).json()
    assert (found["currency"], found["timezone"], found["more"]) == ("USD", "UTC", False)
    assert found["total"]["cost"] == 0.25
    assert found["total"] | {"attempts": 2, "unpriced": 1, "device_s": 1.5} == found["total"]
    assert [(line["key"], line["cost"], line["unpriced"]) for line in found["lines"]] == [("w", 0.25, 0), ("v", 0, 1)]
    assert client.get("/v1/costs", params={"limit": 1}).json()["more"] is False
    assert client.get("/v1/costs", params={"limit": 1, "by": "workflow"}).json()["more"] is True


def test_a_namespace_sees_its_own_costs_only(services: Services, spend: Spend) -> None:  # noqa: F811 as above
    spend("1", namespace="a", workflow="ours")
    spend("2", namespace="b", workflow="theirs")
    services = replace(
        services, settings=services.settings.model_copy(update={"access": AccessSettings(keys="required")})
    )
    key_id, secret = ids.new_text(keys.ID_CHARACTERS, lower_case=True), ids.new_text(keys.SECRET_CHARACTERS)
    with services.database.work() as work:
        key_store.create(work, LOCAL, NewKey("of a", "a", frozenset({KeyScope.READ}), None), key_id, secret)
    client = TestClient(serve(services), base_url="http://localhost")
    headers = {"Authorization": f"Bearer {keys.compose(key_id, secret)}"}
    for by in ("namespace", "workflow", "label:team", "day"):
        found = client.get("/v1/costs", params={"by": by}, headers=headers)
        assert found.status_code == 200, found.text
        assert (found.json()["total"]["cost"], "theirs" in found.text) == (1, False)
    assert client.get("/v1/costs", params={"namespace": "b"}, headers=headers).status_code == 422
    assert client.get("/v1/costs").status_code == 401


@pytest.mark.parametrize(
    "asked",
    [
        {"by": "x"},
        {"last": "0s"},
        {"last": "900d"},
        {"by": "label:a", "last": "32d"},
        {"limit": 1001},
        {"model": "\0"},
        {"until": "0001-01-01T00:00:00Z"},
        {"other": "1"},
    ],
)
def test_impossible_questions_are_refused(client: TestClient, asked: dict[str, str]) -> None:
    assert client.get("/v1/costs", params=asked).status_code == 422


def test_an_estimate_says_what_it_assumes(services: Services, spend: Spend) -> None:  # noqa: F811 as above
    services = replace(services, catalogs=catalogs.merge([catalogs.parse(CATALOG, "here")]))
    client = TestClient(serve(services), base_url="http://localhost")
    spend("7", tokens=(1_000_000, 600_000, 500_000))
    spend(None, tokens=(0, 0, 0), outcome="engine_error")
    found = client.get("/v1/costs/estimate", params={"on": "cloud:x", "last": "7d"}).json()
    assert (found["amount"], found["with_cache"], found["recorded"]["cost"]) == (3, 2.46, 7)
    assert "1 of 2 attempts have told no tokens, and count for nothing" in found["assumed"]
    local = client.get("/v1/costs/estimate", params={"on": "local:1"}).json()
    assert (local["amount"], "neither prices" in local["assumed"][0]) == (None, True)
    spend("0.002", model="local:1", tokens=(1_500, 1_000, 500))
    assert client.get("/v1/costs/estimate", params={"on": "local:1", "model": "m"}).json()["amount"] == 3
    assert client.get("/v1/costs/estimate", params={"on": "nowhere"}).status_code == 404

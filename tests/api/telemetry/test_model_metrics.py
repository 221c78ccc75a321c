"""What models did, over HTTP: figures of a window, by namespace."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fastapi.testclient import TestClient

from app.access import key_store, keys
from app.access.callers import LOCAL, KeyScope
from app.access.keys import NewKey
from app.api.main import serve
from app.api.services import Services
from app.inference.model_metrics import store
from app.inference.model_metrics.metric import MetricKey, ModelMetric, Operation, OperationOutcome, OperationSample
from app.kernel import clock, ids
from app.kernel.database import Database
from app.kernel.sections.access import AccessSettings


@pytest.fixture
def figures(database: Database) -> None:
    done: dict[MetricKey, ModelMetric] = {}
    samples = [
        OperationSample(
            MetricKey("default", "chat:1", Operation.REASONING), OperationOutcome.SUCCEEDED, 2.0, 1.0, 100, 50, 60
        ),
        OperationSample(MetricKey("default", "chat:1", Operation.REASONING), OperationOutcome.FAILED, 9.0),
        OperationSample(MetricKey("b", "embed:1", Operation.EMBEDDING), OperationOutcome.SUCCEEDED, 0.5, None, 500),
        OperationSample(
            MetricKey("b", "chat:1", Operation.COMPRESSION), OperationOutcome.SUCCEEDED, 1.0, None, 900, 300
        ),
    ]
    for sample in samples:
        done.setdefault(sample.key, ModelMetric()).add(sample)
    with database.work() as work:
        store.add(work, store.interval_of(clock.now()), done)


def test_each_kind_of_operation_has_its_figures(client: TestClient, figures: None) -> None:
    found = {(one["model"], one["operation"]): one for one in client.get("/v1/metrics/models").json()["models"]}

    chat = found["chat:1", "reasoning"]
    assert (chat["operations"], chat["succeeded"], chat["failed"], chat["success_rate"]) == (2, 1, 1, 0.5)
    assert (chat["latency_s"]["min"], chat["latency_s"]["avg"], chat["latency_s"]["max"]) == (2.0, 2.0, 2.0)
    assert (chat["first_token_s"]["p95"], chat["tokens_per_second"]) == (1.0, 50.0)
    assert chat["tokens"] == {"read": 100, "written": 50, "saved": 60}
    embed = found["embed:1", "embedding"]
    assert (embed["tokens_per_second"], embed["first_token_s"], embed["ratio"]) == (1000.0, None, None)
    assert (found["chat:1", "compression"]["ratio"], found["chat:1", "compression"]["tokens"]["saved"]) == (3.0, 600)


def test_filters_and_totals(client: TestClient, figures: None) -> None:
    one = client.get("/v1/metrics/models", params={"model": "chat:1", "operation": "reasoning"}).json()

    assert [of["operation"] for of in one["models"]] == ["reasoning"]
    assert [(of["model"], of["operations"]) for of in one["totals"]] == [("*", 2)]
    past = client.get("/v1/metrics/models", params={"last": "1h", "until": "2020-01-01T00:00:00Z"}).json()
    assert past["models"] == past["totals"] == []


@pytest.mark.parametrize("last", ["0s", "-1h", "500d", "soon"])
def test_an_impossible_window_is_refused(client: TestClient, last: str) -> None:
    answer = client.get("/v1/metrics/models", params={"last": last})

    assert answer.status_code == 422
    assert answer.json()["errors"][0]["where"] == "query.last"


def test_a_key_of_a_namespace_sees_what_was_done_for_it(services: Services, database: Database, figures: None) -> None:
    key_id, secret = ids.new_text(keys.ID_CHARACTERS, lower_case=True), ids.new_text(keys.SECRET_CHARACTERS)
    with database.work() as work:
        key_store.create(work, LOCAL, NewKey("of b", "b", frozenset({KeyScope.READ}), None), key_id, secret)
    settings = services.settings.model_copy(update={"access": AccessSettings(keys="required")})
    client = TestClient(serve(replace(services, settings=settings)), base_url="http://localhost")
    headers = {"Authorization": f"Bearer {keys.compose(key_id, secret)}"}

    found = client.get("/v1/metrics/models", headers=headers).json()["models"]
    assert {(one["model"], one["operation"]) for one in found} == {("embed:1", "embedding"), ("chat:1", "compression")}
    assert client.get("/metrics", headers=headers).status_code == 403, "it tells of all namespaces"

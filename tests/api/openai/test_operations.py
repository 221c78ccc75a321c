"""Calls of models are counted in the pool that does them, whether they become runs or not."""

from __future__ import annotations

import httpx2
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from app.inference.model_metrics import store
from app.inference.model_metrics.metric import Operation
from app.kernel import clock
from app.kernel.database import Database
from app.workflows.runs.service import Runs
from tests.api.openai.conftest import MODEL, StartPool
from workers.telemetry.work import WorkCollector

CHAT = {"model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": "Hello"}]}


def test_direct_calls_are_counted_exported_and_stored(
    api: str, start_pool: StartPool, database: Database, runs: Runs
) -> None:
    pool = start_pool()
    figures = pool.runtime.figures
    figures.start(database, lambda model: model == MODEL)
    with httpx2.Client(base_url=api, trust_env=False, timeout=60) as client:
        for _ in range(2):
            assert client.post("/v1/chat/completions", json=CHAT).is_success
        assert client.post("/v1/embeddings", json={"model": MODEL, "input": ["a b", "c"]}).is_success
    registry = CollectorRegistry()
    registry.register(WorkCollector({"worker": "pool@here", "model": MODEL}, figures))
    figures.models.add()

    samples = {
        (one.name, one.labels.get("operation"), one.labels.get("outcome") or one.labels.get("direction")): one.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for one in family.samples
        if "le" not in one.labels
    }
    assert samples["arriero_model_operations_total", "reasoning", "succeeded"] == 2
    assert samples["arriero_model_operations_total", "embedding", "succeeded"] == 1
    assert samples["arriero_model_operation_duration_seconds_count", "reasoning", None] == 2
    assert samples["arriero_model_tokens_total", "reasoning", "out"] == 10
    with database.work() as work:
        found = store.read(work, clock.now(), clock.now(), namespace="default")
    assert found[MODEL, Operation.REASONING].tokens_out == 10
    assert found[MODEL, Operation.EMBEDDING].tokens_in > 0

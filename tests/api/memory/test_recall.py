"""`/v1/recall`, with the vectors of a pool whose engine is simulated, and the job that has vectors made."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis
from sqlalchemy import text

import arriero_client
from app.kernel.database import Database
from app.kernel.sections.recall import RecallSettings
from app.kernel.settings import Settings
from app.memory.recall import storage, vectors
from app.memory.recall.passages import NewPassage, SourceKind
from app.memory.recall.query_vectors import QueryEmbedder, wanted_key
from app.memory.recall.service import Recall
from app.workflows.runs import views
from tests.api.openai.conftest import MODEL, StartPool, catalog
from workers.memory import embeddings, jobs


@pytest.fixture
def settings(database_url: str, redis_url: str, tmp_path: Path) -> Settings:
    recall = RecallSettings(embedding_model=MODEL, query_timeout=timedelta(seconds=30))
    return Settings(data_dir=tmp_path, database_url=database_url, redis_url=redis_url, recall=recall)


@pytest.fixture
def client(api: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=api, timeout=60) as made:
        yield made


def put(database: Database, *texts: str, user: str | None = "anna") -> None:
    passages = [
        NewPassage("default", SourceKind.MESSAGE, f"msg_{n}", one, user, "conv_1", n, role="user", speaker="Ben")
        for n, one in enumerate(texts)
    ]
    with database.work() as work:
        storage.put_in(work, passages)


def test_a_query_gets_its_vector_from_a_pool_and_says_when_there_is_none(
    client: httpx2.Client, database: Database, start_pool: StartPool, valkey: redis.Redis
) -> None:
    put(database, "The boat is green.", "We had soup.", "It was late.")
    body = {"query": "Is the boat green?", "user": "anna"}
    before = client.post("/v1/recall", json=body).json()
    assert before["dense"] == {
        "used": False,
        "reason": "no passage has a vector yet; see: arriero recall --status",
        "method": None,
        "candidates": 0,
        "models": [],
    }

    pool = start_pool()
    with database.work() as work:
        vectors.ensure_model(work, MODEL)
    timeout = timedelta(seconds=60)
    embeddings.embed_passages(database, pool.engine, MODEL, 100, on_stop=lambda _: None, timeout=timeout)
    found = client.post("/v1/recall", json=body).json()

    assert found["dense"]["used"], found["dense"]
    assert found["dense"]["models"] == [MODEL]
    first = found["passages"][0]
    assert (first["source_id"], first["speaker"], first["conversation"]) == ("msg_0", "Ben", "conv_1")
    assert first["scores"]["dense"] is not None
    assert first["why"].startswith("has the words boat, green")
    # The question is no run, and leaves nothing in the broker.
    assert client.get("/v1/runs").json()["runs"] == []
    assert not list(valkey.scan_iter("arriero:tokens:*"))

    pool.close()
    cold = client.post("/v1/recall", json=body).json()
    assert cold["dense"]["used"] is False
    assert f"no pool of {MODEL} has a free slot" in cold["dense"]["reason"]
    assert cold["passages"][0]["source_id"] == "msg_0"
    assert valkey.exists(wanted_key(catalog().get(MODEL).slug))


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({}, "query"),
        ({"query": ""}, "query"),
        ({"query": "x" * 10_001}, "query"),
        ({"query": "a", "limit": 201}, "limit"),
        ({"query": "a", "since": "2026-01-01T00:00:00"}, "since"),
        ({"query": "a", "until": "2026"}, "until"),
        ({"query": "a", "half_life": "0s"}, "half_life"),
        ({"query": "a", "sources": ["email"]}, "sources.0"),
        ({"query": "a", "conversations": ["c"] * 101}, "conversations"),
        ({"query": "a", "users": "b"}, "users"),
        ({"query": "a\x00b"}, ""),
        ({"query": "a", "user": "\x00"}, ""),
    ],
)
def test_a_wrong_request_is_refused_by_its_field(client: httpx2.Client, body: dict[str, Any], where: str) -> None:
    answer = client.post("/v1/recall", json=body)

    assert answer.status_code == (200 if where == "" and "user" not in body else 422), answer.text
    if where:
        assert answer.json()["errors"][0]["where"] == f"body.{where}"


@pytest.mark.parametrize(
    "query", ["'", "\\", "a & b | !c <-> d", "o'clock:*", "…", "%", "日本語のテキスト", "🙂", "1" * 9_000]
)
def test_a_query_of_any_characters_is_only_a_text(client: httpx2.Client, database: Database, query: str) -> None:
    put(database, f"It was said: {query}.")

    assert client.post("/v1/recall", json={"query": query, "user": "anna"}).status_code == 200


def test_the_status_counts_what_waits(client: httpx2.Client, database: Database, api: str) -> None:
    put(database, "The boat is green.", "We had soup.")
    found = client.get("/v1/recall/status").json()

    assert (found["passages"], found["waiting"]) == ({"count": 2, "is_exact": True},) * 2
    assert found["embedding_model"] == MODEL
    assert client.get("/v1/recall/status", params={"namespace": "other"}).json()["passages"]["count"] == 0
    with arriero_client.Client(api) as own:
        assert own.recall_status()["waiting"]["count"] == 2
        recollections = own.recall("soup", user="anna", neighbours=False)
        assert [one.source_id for one in recollections.passages] == ["msg_1"]
        assert not recollections.is_dense


def test_one_run_at_a_time_makes_the_vectors_and_it_has_no_texts(
    database: Database, start_pool: StartPool, valkey: redis.Redis, redis_url: str
) -> None:
    runtime = start_pool().runtime
    embedder = QueryEmbedder(redis_url, catalog, lambda: runtime.settings.recall)
    runtime.recall = Recall(database, embedder)
    assert not jobs.advance(runtime), "nothing was ever said"
    put(database, "The boat is green.")
    assert jobs.advance(runtime)
    assert jobs.advance(runtime)

    (model,) = [vectors.find_model(database, MODEL)]
    assert model is not None
    assert model.run_id is not None
    run = views.run(database, model.run_id).run
    assert run.priority == "batch"
    assert "boat" not in str(run)
    with database.work() as work:
        count = work.row(text("SELECT count(*) AS count FROM run"))
    assert count is not None
    assert count.count == 1

    timeout = timedelta(seconds=60)
    embeddings.embed_passages(database, runtime.engine, MODEL, 9, on_stop=lambda _: None, timeout=timeout)  # type: ignore[arg-type]
    runtime.runs.cancel(model.run_id)
    assert not jobs.advance(runtime)  # a failed run is not repeated at once
    with database.work() as work:
        work.run(text("UPDATE run SET state = 'succeeded', error = NULL"))
    assert not jobs.advance(runtime), "all passages have vectors"
    valkey.set(wanted_key(catalog().get(MODEL).slug), "1")
    assert jobs.advance(runtime), "a query needed the model"
    assert not valkey.exists(wanted_key(catalog().get(MODEL).slug))


def test_a_model_that_is_not_in_the_catalogue_is_named_as_the_problem(
    database: Database, start_pool: StartPool
) -> None:
    runtime = start_pool().runtime
    runtime.settings = runtime.settings.model_copy(update={"recall": RecallSettings(embedding_model="nope")})
    put(database, "The boat is green.")

    assert not jobs.advance(runtime)
    model = vectors.find_model(database, "nope")
    assert model is not None
    assert model.problem == "the catalogue has no such model (setting recall.embedding_model)"

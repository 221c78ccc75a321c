"""Vectors of passages and of queries: made by a pool, never lost, searched when they are there."""

from __future__ import annotations

from concurrent.futures import CancelledError
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text

from app.inference.requests import Embedded, EmbedRequest
from app.kernel.database import Database
from app.kernel.errors import FailureReason, StepFailure
from app.memory.recall import status, storage, vector_index, vectors
from app.memory.recall.passages import NewPassage, SourceKind
from app.memory.recall.query import QueryVectors, RecallMode, RecallQuery
from app.memory.recall.service import Recall
from workers.engine.simulated import SimulatedEngine
from workers.memory import embeddings

#: What the words of the texts mean: directions of their vectors.
MEANINGS = {"boat": 0, "ship": 0, "soup": 1, "broth": 1}
QUICK = timedelta(seconds=60)


def vector(said: str, dimensions: int = 4) -> tuple[float, ...]:
    """A vector of length 1 that stands for the first word with a meaning."""
    place = next((MEANINGS[word] for word in said.lower().replace(".", "").split() if word in MEANINGS), 2)
    return tuple(1.0 if n == place else 0.0 for n in range(dimensions))


class Meanings(SimulatedEngine):
    """An engine whose vectors are known; a text with `bad` cannot be embedded."""

    dimensions = 4

    def __init__(self) -> None:
        super().__init__(2, 500.0, timedelta(0))
        self.texts: list[str] = []

    def embed(self, request: EmbedRequest, *_: Any) -> Embedded:
        if any("bad" in one for one in request.texts):
            raise StepFailure(FailureReason.ENGINE_ERROR, "this text cannot be computed")
        self.texts += request.texts
        made = tuple(vector(one, self.dimensions) for one in request.texts)
        return Embedded(made, len(request.texts), timedelta(0))


class Given:
    """Vectors of queries by the names of models."""

    def __init__(self, *models: str, dimensions: int = 4) -> None:
        self.models, self.dimensions = models, dimensions

    def __call__(self, said: str, models: Any, /) -> QueryVectors:
        return QueryVectors({name: vector(said, self.dimensions) for name in models if name in self.models}, None)

    def take_note(self, _: str, /) -> bool:
        return False

    def close(self) -> None:
        pass


def put(database: Database, *texts: str, first: int = 0) -> None:
    passages = [
        NewPassage("default", SourceKind.MESSAGE, f"msg_{n}", one, conversation="conv_1", position=n)
        for n, one in enumerate(texts, first)
    ]
    with database.work() as work:
        storage.put_in(work, passages)


def made(database: Database, model: str = "one", engine: Meanings | None = None, most: int = 1_000) -> Any:
    with database.work() as work:
        vectors.ensure_model(work, model)
    engine = engine or Meanings()
    return embeddings.embed_passages(database, engine, model, most, on_stop=lambda _: None, timeout=QUICK).output


def found(database: Database, said: str, *models: str, **more: Any) -> list[str]:
    query = RecallQuery(said, "default", neighbours=False, **more)
    return [one.source_id for one in Recall(database, Given(*models)).search(query).passages]


def test_what_means_the_same_is_found_once_it_has_a_vector(database: Database) -> None:
    put(database, "We took the boat.", "There was soup.", "Nothing else.")
    assert found(database, "a ship", "one") == []

    assert made(database) == {"passages": 3, "more": False}
    assert found(database, "a ship", "one")[0] == "msg_0"
    recalled = Recall(database, Given("one")).search(RecallQuery("broth", "default"))
    assert (recalled.dense.used, recalled.dense.models) == (True, ("one",))
    assert recalled.passages[0].source_id == "msg_1"
    assert recalled.passages[0].scores.dense == pytest.approx(1.0, abs=1e-3)


def test_a_step_that_is_stopped_keeps_what_it_has_stored(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one goes on: no passage is embedded twice, none is left out."""
    monkeypatch.setattr(embeddings, "BATCH", 2)
    put(database, *(f"boat {n}" for n in range(5)))
    engine, stops = Meanings(), []
    with database.work() as work:
        vectors.ensure_model(work, "one")
    store = vectors.store

    def stopping_store(*arguments: Any) -> None:
        store(*arguments)
        stops[0]()

    monkeypatch.setattr(vectors, "store", stopping_store)
    with pytest.raises(CancelledError):
        embeddings.embed_passages(database, engine, "one", 100, on_stop=stops.append, timeout=QUICK)
    monkeypatch.setattr(vectors, "store", store)

    assert status.read(database, "default").waiting == 3
    made(database, engine=engine)
    assert sorted(engine.texts) == [f"boat {n}" for n in range(5)]
    assert status.read(database, "default").waiting == 0


def test_one_text_that_cannot_be_embedded_does_not_keep_others_from_their_vectors(database: Database) -> None:
    put(database, "We took the boat.", "a bad text", "There was soup.")
    made(database)

    now = status.read(database, "default")
    assert (now.waiting, now.refused) == (0, 1)
    assert found(database, "ship", "one")[0] == "msg_0"
    assert found(database, "bad text", "one", mode=RecallMode.LEXICAL) == ["msg_1"]

    with database.work() as work:
        vectors.ensure_model(work, "another, which may be able to")
    assert (status.read(database, "default").waiting, status.read(database, "default").refused) == (1, 0)


def test_an_engine_that_fails_for_all_texts_fails_the_step_and_refuses_none(database: Database) -> None:
    put(database, "bad", "bad too")
    with pytest.raises(StepFailure, match="cannot be computed"):
        made(database)

    assert (status.read(database, None).waiting, status.read(database, None).refused) == (2, 0)


def test_a_removed_passage_takes_its_vectors_along_and_one_removed_meanwhile_gets_none(database: Database) -> None:
    put(database, "boat", "soup")
    with database.work() as work:
        model = vectors.ensure_model(work, "one")
    batch = vectors.missing(database, model, 10)
    with database.work() as work:
        storage.remove_in(work, "default", SourceKind.MESSAGE, ["msg_0"])
    vectors.store(database, model, batch, {one.id: vector(one.text) for one in batch.passages})

    with database.work() as work:
        row = work.row(text("SELECT count(*) AS count FROM passage_vector"))
    assert row is not None
    assert row.count == 1


def test_both_models_are_searched_while_passages_are_embedded_anew(database: Database) -> None:
    put(database, "We took the boat.", "There was soup.")
    made(database, "old")
    put(database, "Another boat.", first=2)
    assert made(database, "new", most=1) == {"passages": 1, "more": True}  # that of the queue

    assert set(found(database, "ship", "old", "new")[:2]) == {"msg_0", "msg_2"}

    made(database, "new")
    states = {model.name: model.state for model in status.read(database, None).models}
    assert states == {"old": "retired", "new": "ready"}
    assert set(found(database, "ship", "new")[:2]) == {"msg_0", "msg_2"}
    old = vectors.find_model(database, "old")
    assert old is not None
    assert vectors.remove_some(database, old, 100) == 2
    vectors.forget_model(database, old)
    assert [model.name for model in status.read(database, None).models] == ["new"]


def test_vectors_of_another_length_than_those_that_are_stored_are_refused(database: Database) -> None:
    put(database, "boat")
    made(database)
    put(database, "soup", first=1)
    engine = Meanings()
    engine.dimensions = 6

    with pytest.raises(StepFailure, match="was replaced"):
        made(database, engine=engine)
    assert status.read(database, None).waiting == 1


def test_the_index_finds_what_a_comparison_of_all_finds(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    put(database, *(f"{word} {n}" for n in range(30) for word in ("boat", "soup", "else")))
    made(database)
    exact = Recall(database, Given("one")).search(RecallQuery("ship", "default", mode=RecallMode.DENSE, limit=30))
    model = vectors.find_model(database, "one")
    assert model is not None
    vector_index.create(database, model.id, 4, 90)
    vectors.note_index(database, model, is_indexed=True)
    monkeypatch.setattr("app.memory.recall.dense._COMPARED", 0)
    monkeypatch.setattr("app.memory.recall.dense._INDEX_COST", 0)
    monkeypatch.setattr("app.memory.recall.lexical.EXACT_LIMIT", -1)

    indexed = Recall(database, Given("one")).search(RecallQuery("ship", "default", mode=RecallMode.DENSE, limit=30))
    vector_index.drop(database, model.id)

    assert (exact.dense.method, indexed.dense.method) == ("exact", "index")
    assert {one.id for one in indexed.passages} == {one.id for one in exact.passages}

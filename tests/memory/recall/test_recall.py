"""Recall: what is written is found, by whom it may be, and nothing else is."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from app.kernel.database import Database
from app.memory.recall import storage
from app.memory.recall.passages import NewPassage, SourceKind
from app.memory.recall.query import RecallQuery, RecallScope
from app.memory.recall.service import Recall

START = datetime(2026, 1, 1, tzinfo=UTC)


def message(position: int, text: str, speaker: str = "Anna", **more: object) -> NewPassage:
    values = {
        "namespace": "default",
        "source": SourceKind.MESSAGE,
        "source_id": f"msg_{position}",
        "conversation": "conv_1",
        "position": position,
        "role": "user",
        "speaker": speaker,
        "at": START + timedelta(days=position),
        "user": "u1",
    }
    return NewPassage(text=text, **(values | more))  # type: ignore[arg-type] # fields of several types


@pytest.fixture
def talk(database: Database) -> Database:
    texts = [
        "We had soup for lunch, and then a walk along the river.",
        "The lease of the boat ends on 31 May.",
        "Where did you put the keys of the boat?",
        "In the blue drawer, as always.",
        "My sister's flight lands at nine.",
    ]
    with database.work() as work:
        storage.put_in(work, [message(n, one, "Anna" if n % 2 else "Ben") for n, one in enumerate(texts)])
    return database


def found(database: Database, text: str, **more: object) -> list[str]:
    query = RecallQuery(text, more.pop("namespace", "default"), more.pop("user", "u1"), **more)  # type: ignore[arg-type] # fields of several types
    return [one.source_id for one in Recall(database).search(query).passages]


def test_passages_are_found_by_some_of_the_words_of_a_question(talk: Database) -> None:
    assert found(talk, "When does the lease end?")[0] == "msg_1"
    assert found(talk, "flight of your sister", neighbours=False) == ["msg_4"]


def test_an_answer_is_found_beside_its_question(talk: Database) -> None:
    assert found(talk, "Where are the keys?")[:2] == ["msg_2", "msg_3"]
    assert "msg_3" not in found(talk, "Where are the keys?", neighbours=False)


def test_the_speaker_is_a_word_of_what_was_said(talk: Database) -> None:
    assert set(found(talk, "Ben", neighbours=False)) == {"msg_0", "msg_2", "msg_4"}


def test_without_vectors_the_answer_says_so(talk: Database) -> None:
    recalled = Recall(talk).search(RecallQuery("keys", "default", "u1"))

    assert not recalled.dense.used
    assert recalled.dense.reason == "no embedding model is configured"
    assert recalled.passages[0].matched == ("keys",)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"namespace": "other"}, set()),
        ({"user": "u2"}, {"msg_20"}),
        ({"user": None}, {"msg_30"}),
        ({"user": "u2", "scope": RecallScope.SHARED}, {"msg_20", "msg_30"}),
        ({"scope": RecallScope.ALL}, {"msg_1", "msg_2", "msg_20", "msg_30"}),
        ({"conversations": ("conv_2",), "scope": RecallScope.ALL}, {"msg_20"}),
        ({"since": START + timedelta(days=2)}, {"msg_2"}),
        ({"until": START + timedelta(days=2)}, {"msg_1"}),
        ({"roles": ("assistant",), "scope": RecallScope.ALL}, {"msg_30"}),
        ({"sources": (SourceKind.MEMORY,)}, set()),
        ({"outside": ("conv_1", 2)}, {"msg_1"}),
    ],
)
def test_only_what_a_query_may_see_is_found(talk: Database, more: dict[str, object], expected: set[str]) -> None:
    with talk.work() as work:
        storage.put_in(work, [message(20, "Our boat is green.", user="u2", conversation="conv_2")])
        storage.put_in(work, [message(30, "Boats are for all.", user=None, conversation=None, role="assistant")])

    assert set(found(talk, "boat boats", neighbours=False, **more)) == expected


def test_a_source_that_is_written_again_is_replaced_and_a_removed_one_is_gone(talk: Database) -> None:
    with talk.work() as work:
        storage.put_in(work, [message(1, "The lease was prolonged.")])
    assert found(talk, "31 May", neighbours=False) == []
    assert found(talk, "prolonged", neighbours=False) == ["msg_1"]

    with talk.work() as work:
        storage.remove_in(work, "default", SourceKind.MESSAGE, ["msg_1"])
    assert found(talk, "prolonged") == []

    with talk.work() as work:
        storage.remove_conversations_in(work, "default", ["conv_1"])
    assert found(talk, "boat sister soup") == []

"""Parts of texts, their words, and the choice of words for a search."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.memory.recall import passages, ranking, word_plan
from app.memory.recall.passages import NewPassage, SourceKind


@given(st.text(st.sampled_from("ab .!?\n日本…🙂"), max_size=4_000))
def test_parts_have_all_of_a_text_and_none_is_long(said: str) -> None:
    parts = passages.parts_of(said)

    assert "".join("".join(parts).split()) == "".join(said.split())
    assert all(passages._cost(part) <= passages.PART_SIZE for part in parts)
    assert all(part.strip() for part in parts)


def test_a_long_text_is_split_between_its_sentences() -> None:
    sentence = "This is a sentence of some words about the boat. "
    parts = passages.parts_of(sentence * 100)

    assert len(parts) > 4
    assert all(part.endswith(".") for part in parts)


def test_words_of_a_scope_are_no_words_of_texts() -> None:
    own = NewPassage("ns", SourceKind.MESSAGE, "m", "u|ns|eve n|other c|ns|conv_2", user="anna", conversation="conv_1")
    lexemes, _ = passages.lexemes_of(own, own.text)

    assert "'u|ns|anna' " in lexemes
    assert "'n|ns' " in lexemes
    assert "eve'" in lexemes
    assert "|eve" not in lexemes


def test_stop_words_are_searched_only_when_there_are_no_others() -> None:
    assert word_plan.query_terms("Where did you put the keys?") == ["put", "keys"]
    assert word_plan.query_terms("where was it") == ["where", "was", "it"]


def test_names_in_what_was_found_lead_to_the_next_fact() -> None:
    texts = ["By the way, Mira is Anna's sister.", "Locker B-104? Mira has it.", "The end."]

    assert word_plan.names_in(texts, {"anna", "siste"}) == ["mira", "locke"]
    assert ranking.bridged({1: 1.0, 2: 0.2}, {1: 4.0, 2: 4.0, 3: 2.0}, 0.5) == {1: 1.0, 2: pytest.approx(0.6)}
    assert ranking.bridged({1: 1.0, 2: 0.2}, {}) == {1: 1.0, 2: 0.2}
    assert ranking.bridged({1: 0.0}, {1: 4.0}) == {1: 0.0}


def test_rare_words_find_their_passages_and_frequent_ones_only_together() -> None:
    frequencies = {"often": 0.5, "some": 0.02, "more": 0.03}
    terms = word_plan.rarest(["often", "more", "rare", "some"], frequencies)
    assert terms == ["rare", "some", "more", "often"]

    assert word_plan.chosen(terms, frequencies, 0.001, 100_000, 500) == "(('rare') | ('some' & 'more'))"
    assert word_plan.chosen(["some", "often"], frequencies, 0.001, 100_000, 500) == "(('some' & 'often'))"


def test_both_scores_count_and_a_neighbour_gains_and_old_ones_lose() -> None:
    scores = ranking.combined({1: 10.0, 2: 5.0}, [{2: 0.9, 3: 0.5}, {4: 0.8, 2: 0.1}])
    assert scores == pytest.approx({1: 1.0, 2: 1.5, 3: 0.0, 4: 1.0})

    now = datetime(2026, 1, 31, tzinfo=UTC)
    ranked = ranking.ranked({1: 1.0, 2: 0.9}, [(1, 5)], {}, now, None, 0.5)
    assert [(one.id, one.score) for one in ranked] == [(1, 1.0), (2, 0.9), (5, 0.5)]
    times = {1: now - timedelta(days=30), 2: now}
    ranked = ranking.ranked({1: 1.0, 2: 0.9}, [], times, now, timedelta(days=15))
    assert [(one.id, one.decay) for one in ranked] == [(2, 1.0), (1, 0.25)]

"""Leads: points only for what the lead wrote."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.real_estate import leads
from benchmarks import real_estate_data


def said(*texts: str, agent: str = "Do you pay in cash?") -> Any:
    return [{"sender": "agent", "text": agent}, *({"sender": "lead", "text": text} for text in texts)]


def test_a_serious_buyer_is_an_a_and_a_curious_one_is_not() -> None:
    quotes = {
        "cash": "We pay in cash.",
        "budget": "Our budget is 400,000.",
        "soon": "We must move in May.",
        "viewing": "When can we see it?",
    }
    conversation = said(*quotes.values(), "Call +44 20 7946 0958.")
    findings: Any = [{"quote": quote, "topic": topic} for topic, quote in quotes.items()]
    found = leads.score_lead(conversation, findings, 400_000)
    assert (found["grade"], found["score"], found["contact"]) == ("A", 95, "+44 20 7946 0958")
    assert found["action"]["ask"] == ["What should the home have?"]
    assert {one["factor"]: one["evidence"] for one in found["factors"]}["timeline"] == "We must move in May."

    curious = leads.score_lead(said("I am just looking."), [{"quote": "I am just looking.", "topic": "curious"}])
    assert (curious["grade"], curious["score"]) == ("D", 0)


@pytest.mark.parametrize(
    ("finding", "reason"),
    [
        ({"quote": "We pay in cash.", "topic": "cash"}, "the lead did not write this"),
        ({"quote": "Do you pay in cash?", "topic": "cash"}, "the lead did not write this"),
        ({"quote": "", "topic": "cash"}, "the lead did not write this"),
        ({"quote": "Hello there.", "topic": "budget"}, "it has no amount"),
        ({"quote": "Hello there.", "topic": "A" * 100}, "the topic is none of"),
    ],
)
def test_what_the_lead_did_not_write_counts_nothing(finding: Any, reason: str) -> None:
    found = leads.score_lead(said("Hello there. I have 3 bedrooms."), [finding])
    assert found["score"] == 0
    assert found["rejected"][0]["reason"].startswith(reason)


@pytest.mark.parametrize(
    ("text", "budget", "points"),
    [
        ("Up to 400,000.", 400_000, 25.0),
        ("At most 350k!", 350_000, 17.5),
        ("1.2 million would do.", 1_200_000, 25.0),
        ("About 250 000 at most.", 250_000, 0.0),
    ],
)
def test_a_budget_counts_by_its_share_of_the_price(text: str, budget: int, points: float) -> None:
    found = leads.score_lead(said(text), [{"quote": text, "topic": "budget"}], 400_000)
    assert found["budget"] == budget
    assert found["factors"][0]["points"] == points


def test_sentences_are_those_of_the_lead_and_bounded() -> None:
    found = leads.lead_sentences(said("One here. Two here!\nThree?", *["More text."] * 60))
    assert [one["text"] for one in found["sentences"][:3]] == ["One here.", "Two here!", "Three?"]
    assert (len(found["sentences"]), found["left_out"]) == (40, 23)


def test_all_sentences_of_seeded_leads_are_found() -> None:
    for lead in real_estate_data.leads(4, 20):
        conversation: Any = lead.conversation
        found = leads.lead_sentences(conversation)["sentences"]
        known = [text for text, _ in lead.topics]
        assert [one["text"] for one in found] == known


@pytest.mark.parametrize(
    ("sentence", "cue"),
    [
        ("We pay cash.", "cash"),
        ("Up to 350k.", "budget"),
        ("Write to me at 12345@example.com.", "other"),
        ("The bank approved the loan.", "approved"),
        ("Three bedrooms at least.", "wish"),
        ("La semana que viene.", ""),
        ("We have two children.", ""),
    ],
)
def test_a_cue_is_given_only_where_the_words_leave_no_choice(sentence: str, cue: str) -> None:
    assert leads.lead_sentences(said(sentence))["sentences"] == [{"text": sentence, "cue": cue}]


@given(st.lists(st.text(max_size=80), max_size=6), st.lists(st.tuples(st.text(max_size=40), st.text(max_size=10))))
def test_no_conversation_makes_the_score_fail(texts: list[str], pairs: list[tuple[str, str]]) -> None:
    findings: Any = [{"quote": quote, "topic": topic} for quote, topic in [*pairs, *((text, "soon") for text in texts)]]
    found = leads.score_lead(said(*texts), findings, 1.0)
    assert 0 <= found["score"] <= 100
    json.dumps(found, allow_nan=False)

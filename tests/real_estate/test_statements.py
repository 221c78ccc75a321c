"""Texts: what passes states only facts, whatever a model writes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.real_estate import languages, replies, statements
from benchmarks.real_estate import MESSAGES, RECORD

FACTS = [
    "Estimate: 568,700. With a probability of 80 % between 481,400 and 674,300, on 2015-05-27.",
    "[A1] sold for 713,400 on 2014-12-23, 3,330 sqft, 1.46 km away, adjusted to 488,700.",
    "[B2] sold for 519,000 on 2014-11-25, 2,580 sqft, 2.3 km away, adjusted to 565,700.",
]


def problems(text: str, **options: Any) -> list[str]:
    found: list[str] = statements.check_text(text, FACTS, ["A1", "B2"], **options)["problems"]
    return found


def test_a_text_of_facts_passes() -> None:
    text = "The home is worth about 568,700. [A1] sold for 713,400. [B2] is 2.3 km away and adjusted to 565,700."
    assert problems(text, citations=2) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("The home is worth about 570,000 today.", "570,000 is in no fact"),
        ("The home is worth 568,700, as [C3] and [A1] say.", "[C3] is no comparable"),
        ("The home is worth 568,700, says [A1] alone.", "it cites 1 comparables, not 2"),
        ("[A1] is only 2.3 km away from it. [B2] too.", "2.3 is no fact of A1"),
        ("See https://x.example for [A1] and [B2] today.", "it has a link or an address that is no fact"),
        ("[A1] [B2]", "it has 9 characters, not 20 to 2000"),
    ],
)
def test_what_is_no_fact_is_named(text: str, problem: str) -> None:
    assert problem in problems(text, citations=2)


def test_numbers_are_the_same_in_all_forms_and_digits() -> None:
    for text in ("568.700", "568 700", "568\u202f700", "५६८,७००", "๕๖๘,๗๐๐", "568700", "568,700.00"):
        assert problems(f"The home is worth {text} in all.") == [], text
    for text in ("568.7", "5687", "56870", "568,701"):
        assert problems(f"The home is worth {text} in all.") != [], text


@pytest.mark.parametrize(
    ("direction", "text", "passed"),
    [
        ("rising", "Prices rose in the last year.", True),
        ("rising", "Prices fell in the last year.", False),
        ("falling", "Prices rose in the last year.", False),
        ("flat", "Prices were stable in the last year.", True),
        ("rising", "Prices did something in the last year.", False),
    ],
)
def test_the_direction_is_that_of_the_figures(direction: Any, text: str, passed: bool) -> None:
    assert statements.check_text(text, [], direction=direction)["passed"] is passed


def test_the_text_of_code_is_used_only_if_no_draft_passes() -> None:
    wrong, right = "It is worth 999,999 in total.", "It is worth 568,700 in total."
    found = statements.choose_text([wrong, right], "otherwise", FACTS)
    assert (found["text"], found["by"]) == (right, "model")
    assert found["drafts"][0]["problems"] == ["999,999 is in no fact"]
    found = statements.choose_text([wrong, ""], "otherwise", FACTS)
    assert (found["text"], found["by"]) == ("otherwise", "code")


@pytest.mark.parametrize("code", sorted(languages.LANGUAGES))
def test_each_language_is_told_and_its_reply_passes_only_as_itself(code: Any) -> None:
    for tone in ("formal", "friendly", "brief"):
        found = replies.reply_facts(MESSAGES[code], RECORD, tone=tone)
        assert (found["language"], found["detected"]) == (code, True)
        for other in languages.LANGUAGES:
            checked = statements.check_text(found["text"], found["facts"], language=other, tone=tone)
            assert checked["passed"] is (other == code), (code, other, tone, checked)


def test_only_facts_of_the_record_are_shown_and_an_unknown_language_is_said() -> None:
    found = replies.reply_facts("???", {**RECORD, "owner": "Secret Person", "floor_price": 1}, fallback="it")
    assert (found["language"], found["detected"]) == ("it", False)
    assert "Secret" not in str(found)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("de", "Wir garantieren Ihnen, dass der Preis für das Haus steigt und Sie gewinnen."),
        ("de", "Du kannst das Haus sehen, wann du willst, und wir sind für dich da."),
        ("fr", "Nous garantissons que le prix de la maison est pour vous."),
        ("es", "Te garantizamos: la casa es para ti y tus hijos, con gusto."),
    ],
)
def test_promises_and_familiar_words_are_found(code: Any, text: str) -> None:
    checked = statements.check_text(text, [], language=code, tone="formal")
    assert any("promises" in one or "not formal" in one for one in checked["problems"]), checked


@given(st.text(max_size=300), st.lists(st.text(max_size=60), max_size=5))
def test_no_text_makes_the_check_fail(text: str, facts: list[str]) -> None:
    found = statements.check_text(text, facts, language="hi", direction="flat", tone="formal")
    assert found["passed"] is (not found["problems"])


def test_availability_and_names_of_the_example_are_no_facts_unless_the_record_has_them() -> None:
    text = "Dear Ana Prado, thank you for your message. The house is still available for you."
    facts = replies.reply_facts(MESSAGES["en"], RECORD)
    assert "Hall" in facts["never"]
    found = statements.check_text(text, facts["facts"], language="en", never=facts["never"])
    assert found["problems"] == ["that it is available is no fact"]
    facts = replies.reply_facts(MESSAGES["en"], {**RECORD, "available": "2026-12-01"})
    assert statements.check_text(text, facts["facts"], language="en", never=facts["never"])["passed"]
    named = statements.check_text(text.replace("Ana Prado", "Mr Hall"), facts["facts"], never=facts["never"])
    assert named["problems"] == ["it has 'Hall', which is no fact"]


@pytest.mark.parametrize("code", sorted(languages.LANGUAGES))
def test_the_example_of_each_language_passes_as_a_reply_to_its_own_facts(code: Any) -> None:
    example = replies.reply_facts(MESSAGES[code], RECORD)["example"]
    checked = statements.check_text(example["reply"], example["facts"], language=code, tone="formal")
    assert checked["passed"], checked

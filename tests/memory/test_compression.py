"""Compression: promises that hold for any text, and the methods one by one."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.memory.compression import compressor, messages, protection, relevance, summary, texts
from app.memory.compression.compressor import ALL_METHODS, ReductionMethod, Target, compress
from app.memory.compression.conversation import Protection, Sentence, Turn
from app.memory.compression.messages import UnusableInput
from app.memory.compression.protection import SpanKind
from app.memory.compression.report import Compressed

PIECES = st.sampled_from(
    [
        *(
            "the ",
            "and ",
            "of ",
            "lake ",
            "parcel ",
            "very ",
            "not ",
            "nobody ",
            "Anna Berg ",
            "Zürich ",
            "AB-123 ",
            "42.50 € ",
        ),
        *(
            "https://a.example/x?y=1 ",
            "`rm -rf /` ",
            '"as it is" ',
            "x@y.example ",
            "nicht ",
            "не ",
            "。",
            "今日は晴れです。",
            "مرحبا ",
        ),
        *(
            ". ",
            "! ",
            "? ",
            ".\n",
            "\n\n",
            "  ",
            "**bold** ",
            "<b>",
            "</b>",
            "# ",
            "\ud800",
            "\0",
            "e\u0301 ",
            "👩‍👩‍👧 ",
        ),
    ]
)
TEXT = st.lists(PIECES, max_size=60).map("".join)
TURNS = st.lists(
    st.builds(Turn, TEXT, st.sampled_from(["user", "assistant"]), st.sampled_from(["", "Ada"])), min_size=1, max_size=8
)
METHODS = st.frozensets(st.sampled_from(list(ReductionMethod)), min_size=1)


def count(all_texts: Sequence[str]) -> list[int]:
    """Words and marks: a tokenizer whose parts do not add up to the whole."""
    return [len(re.findall(r"\w{1,4}|[^\w\s]", text)) for text in all_texts]


def total(found: Compressed) -> int:
    return sum(count(found.contents))


def is_part(short: str, long: str) -> bool:
    """Whether the characters of the first, without blanks, are in the second in this order."""
    rest = iter(long)
    return all(character in rest for character in "".join(short.split()))


@settings(deadline=None, max_examples=60)
@given(TURNS, st.integers(1, 80), METHODS, st.sampled_from(["", "Where is the parcel of Anna?", "晴れ"]))
def test_a_result_keeps_order_spans_and_its_word_about_the_budget(
    turns: list[Turn], most: int, methods: frozenset[ReductionMethod], query: str
) -> None:
    found = compress(turns, Target(max_tokens=most, methods=methods, query=query), count)

    assert found.tokens_after == total(found)
    assert bool(found.missed) == (found.tokens_after > most)
    assert found.tokens_after <= found.tokens_before or ReductionMethod.PRUNE not in methods
    for sentence in found.conversation.sentences:
        at = 0
        for span in sentence.spans:
            text = sentence.text[span.start : span.end]
            if not sentence.dropped:
                at = sentence.kept_text.index(text.strip(), at) + len(text.strip())
    if ReductionMethod.STRUCTURE not in methods:
        assert all(is_part(left, turn.content) for left, turn in zip(found.contents, turns, strict=True))
    if methods <= {ReductionMethod.STRUCTURE, ReductionMethod.PRUNE}:
        assert {one.dropped for one in found.conversation.sentences} <= {"", "pruned"}


@settings(deadline=None, max_examples=40)
@given(TURNS, st.integers(1, 80))
def test_what_fits_is_returned_as_it_is(turns: list[Turn], most: int) -> None:
    once = compress(turns, Target(max_tokens=most), count)
    if once.missed:
        return
    again = compress([Turn(text) for text in once.contents], Target(max_tokens=most), count)

    assert again.contents == once.contents
    assert again.methods == ()


@settings(deadline=None, max_examples=60)
@given(TEXT)
def test_sentences_are_the_whole_text_and_cut_no_span(text: str) -> None:
    spans = protection.spans(text)
    places = texts.sentences(text, spans)

    assert "".join(text[place.start : place.end] for place in places) == text
    assert not any(place.start < cut.end < place.end for place in spans for cut in places)


@pytest.mark.parametrize(
    ("text", "kind", "span"),
    [
        ("He paid $1,200.50 for it", SpanKind.NUMBER, "$1,200.50"),
        ("on 2026-11-21 at noon", SpanKind.NUMBER, "2026-11-21"),
        ("It rose by 40 % again", SpanKind.NUMBER, "40 %"),
        ("ask anna.lee@mail.example now", SpanKind.EMAIL, "anna.lee@mail.example"),
        ("see https://a.example/b?c=d, please", SpanKind.URL, "https://a.example/b?c=d"),
        ("the order AB-123 is late", SpanKind.ID, "AB-123"),
        ("call parse_header before", SpanKind.ID, "parse_header"),
        ("run `rm -rf build` here", SpanKind.CODE, "`rm -rf build`"),
        ("she said “leave it” to us", SpanKind.QUOTE, "“leave it”"),
        ("we do not know", SpanKind.NEGATION, "not"),
        ("we don't know", SpanKind.NEGATION, "don't"),
        ("ich habe keinen Schlüssel", SpanKind.NEGATION, "keinen"),
        ("я не знаю", SpanKind.NEGATION, "не"),
        ("with Vincent van Gogh in town", SpanKind.NAME, "Vincent van Gogh"),
        ("the colour of magic", SpanKind.GIVEN, "colour"),
        ("ticket T9 was closed", SpanKind.GIVEN, "ticket T9"),
    ],
)
def test_what_is_protected(text: str, kind: SpanKind, span: str) -> None:
    found = protection.spans(text, patterns=[r"ticket \w+"], given=["colour"])

    assert (kind, span) in {(one.kind, text[one.start : one.end]) for one in found}


def test_a_duplicate_with_another_number_name_or_negation_is_none() -> None:
    said = [
        "The parcel of Anna is in the red locker 14 today.",
        "The parcel of Anna is in the red locker 15 today.",
        "The parcel of Bert is in the red locker 14 today.",
        "The parcel of Anna is not in the red locker 14 today.",
        "the parcel of Anna is in the  red locker 14 today!",
        "So the parcel of Anna is in the red locker 14 today.",
    ]
    found = compress(
        [Turn(text) for text in said],
        Target(max_tokens=1, methods=frozenset({ReductionMethod.DEDUPLICATE})),
        count,
    )

    assert [bool(text) for text in found.contents] == [False, True, True, True, False, True]
    assert [one.dropped for one in found.conversation.sentences] == ["duplicate", "", "", "", "near_duplicate", ""]


def test_a_query_decides_what_stays_also_across_two_facts() -> None:
    small_talk = [
        Turn(f"On day {i} we went to the mill in {city}, and Jon bought {i} stamps.")
        for i, city in enumerate(["Graz", "Cork"] * 40)
    ]
    facts = [Turn("Mira is the sister of Anna."), Turn("Mira plays the cello in the evening.")]
    turns = [*small_talk[:20], facts[0], *small_talk[20:60], facts[1], *small_talk[60:]]
    found = compress(turns, Target(6, query="Which instrument does Anna's sister play?"), count)

    assert {facts[0].content, facts[1].content} <= set(found.contents)
    assert not found.missed


def test_dense_scores_decide_where_no_word_is_shared() -> None:
    turns = [Turn(f"Jon bought {i} stamps in the old mill by the lake.") for i in range(30)]
    turns[7] = Turn("The lease runs out in spring.")
    target = Target(8, methods=frozenset({ReductionMethod.SELECT}), query="When must they leave the apartment?")
    passages = relevance.passages(compressor.split(turns, target))
    dense = [1.0 if "lease" in passage.text else 0.1 for passage in passages]

    assert turns[7].content in compress(turns, target, count, dense=dense).contents


def test_what_a_user_protects_stays_and_a_missed_target_says_so() -> None:
    turns = [Turn("Nothing here matters much to anybody. The keyword xyzzy is in this one.")]
    found = compress(turns, Target(max_tokens=2, protection=Protection(texts=["xyzzy"])), count)

    assert found.contents == ["The keyword xyzzy is in this one."]
    assert found.missed.startswith(f"{found.tokens_after} tokens are left: 1 sentences are kept")


def test_structure_goes_and_code_stays() -> None:
    given_text = "# Title\n\n\n\n<b>Bold</b>   text **here**.\n\n---\n```\n  a  <b>  #\n```\n"
    found = compress([Turn(given_text)], Target(1.01, methods=frozenset({ReductionMethod.STRUCTURE})), count)

    assert found.contents == ["Title\n\n Bold text here.\n\n```\n  a  <b>  #\n```"]
    indented = '{\n  "a":  "x  y",\n  "b": [1.50,  2]\n}'
    only = Target(max_tokens=1, methods=frozenset({ReductionMethod.STRUCTURE}))
    assert compress([Turn(indented)], only, count).contents == ['{"a":"x  y","b":[1.50,2]}']


def test_messages_keep_roles_order_fields_and_tool_results() -> None:
    given_messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief and be very polite to everybody."},
        {"role": "user", "content": "Tell me about the weather in the north, and then about the lake.", "name": "Ada"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1"}]},
        {"role": "tool", "content": "It is 14 degrees and there is a very light wind.", "tool_call_id": "c1"},
        {"role": "assistant", "content": "I think that it is quite a nice day and you should go out."},
        {"role": "user", "content": "Thank you, and what about tomorrow?"},
    ]
    of = messages.given(given_messages, keep_recent=1)
    done = compress(of.turns, Target(1.3), count)
    found = messages.result(of, done)

    assert found[0] == given_messages[0]
    assert found[-1] == given_messages[-1]
    assert [one for one in found if one["role"] == "tool" or "tool_calls" in one] in ([], given_messages[2:4])
    order = [one["role"] for one in given_messages]
    assert [one["role"] for one in found] == order or len(found) < len(order)
    assert messages.given({"of": "a text", "summary": "s"}, 1).summary == "s"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, "neither a text nor a list of messages"),
        ([5], r"\[0\] is no message"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"\[0\].content is no text"),
        ([{"role": 7, "content": "x"}], r"\[0\].role is no text"),
        ("x" * (messages.MAX_CHARACTERS + 1), "more than"),
        ([{"role": "user", "content": ""}] * (messages.MAX_MESSAGES + 1), "at most"),
    ],
)
def test_an_unusable_input_is_refused_with_its_place(value: Any, message: str) -> None:
    with pytest.raises(UnusableInput, match=message):
        messages.given(value, 1)


def test_a_summary_says_nothing_that_its_source_does_not_have() -> None:
    source = "Anna Berg ordered 14 chairs with the order AB-123. She wrote from anna@shop.example."
    sentence = Sentence(0, source, texts.words(source), protection.spans(source))
    wrote = "Anna ordered 14 chairs. Bert Falk paid 99 euros. She will write again."
    found = summary.checked(wrote, [sentence], lambda text: len(text.split()), 40)

    assert found.text.startswith("Summary of what was left out: Anna ordered 14 chairs. She will write again.")
    assert list(found.removed) == ["Bert Falk paid 99 euros."]
    assert "AB-123" in found.text
    assert "anna@shop.example" in found.text
    assert summary.checked(wrote, [sentence], lambda text: len(text.split()), 6).text == ""


def test_a_pattern_that_matches_everywhere_is_refused() -> None:
    turns = [Turn("a " * (protection.MAX_MATCHES + 1))]

    with pytest.raises(protection.TooManyMatches, match="'a'"):
        compress(turns, Target(2, protection=Protection(patterns=["a"])), count)
    with pytest.raises(protection.TooManyMatches, match="'a'"):
        compress(turns, Target(2, protection=Protection(texts=["a"])), count)


@pytest.mark.parametrize("evil", ["a", "\n", ". ", "1,", "a-", "`", '"', " a/b", "A. ", "。", "<b>", "**a** ", "the "])
def test_time_does_not_explode(evil: str) -> None:
    """A tenth of a megabyte; quadratic code would take minutes."""
    began = time.process_time()
    compress([Turn(evil * (100_000 // len(evil)))], Target(2, query="a the", methods=ALL_METHODS), count)

    assert time.process_time() - began < 20

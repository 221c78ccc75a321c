"""Jump-ahead: what a grammar forces is drafted, and the texts stay those of decoding one token at a time."""

from __future__ import annotations

import json
import threading
from concurrent.futures import CancelledError
from typing import Any

import pytest

from app.grammar import to_gbnf
from app.inference.requests import ChatMessage, FinishReason, GenerateRequest, Sampling, Tool
from tests.workers.engine.speculation.conftest import GREEDY, Pair, require_settled
from workers.engine.bindings import native
from workers.engine.sampling.constraint import FirstByteIndex
from workers.engine.sampling.forced_text import MAX_FORCED, ForcedText
from workers.engine.sampling.grammars import CompiledGrammar, GrammarCache
from workers.engine.speculation.forced import ForcedPlace, ForcedRates, ForcedTokens, Look
from workers.engine.tasks import EngineTask, new_sampler

#: Keys that the prompts do not contain.
ORDER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "customer_identification": {"enum": ["Ana", "Ben"]},
        "größe_und_höhe": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["customer_identification", "größe_und_höhe"],
    "additionalProperties": False,
}
WEATHER = Tool(
    "weather",
    "The weather of a city.",
    {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
)


def ask(text: str = "Ana orders 42.", tokens: int = 64, **more: Any) -> GenerateRequest:
    given = {"sampling": GREEDY, "schema": ORDER, "keeps_cut": True} | more
    return GenerateRequest(messages=(ChatMessage("user", text),), max_tokens=tokens, **given)


def test_forced_tokens_need_no_decode_of_their_own(pair: Pair) -> None:
    """Counted in decodes: keys, punctuation and the rest of an enum's value are most of this text."""
    found, decodes, without = pair.same(ask())
    assert json.loads(found.text)["größe_und_höhe"] >= 0
    assert decodes < 0.75 * without
    assert found.tokens_accepted >= without - decodes > 8


def test_the_arguments_of_a_tool_call_are_reached_sooner(pair: Pair) -> None:
    found, decodes, without = pair.same(
        ask("The weather in Rome?", 80, schema=None, tools=(WEATHER,), tool_choice="required")
    )
    assert found.tool_calls[0].name == "weather"
    assert decodes < 0.75 * without


def test_a_model_that_splits_forced_text_otherwise_keeps_its_tokens(pair: Pair) -> None:
    """The token with which the tokenizer continues is unwanted, so every draft of it is cut, and made anew."""
    model = pair.eager._loop.model
    (usual, *_) = model.tokenize("identification", add_special=False, parse_special=False)
    sampling = Sampling(temperature=0, logit_bias={usual: -100.0})
    found, decodes, without = pair.same(ask(tokens=24, schema=None, grammar=to_gbnf(ORDER), sampling=sampling))
    assert found.tokens_drafted > found.tokens_accepted > 2
    assert decodes < without


@pytest.mark.parametrize(
    ("more", "finish"),
    [
        ({"stop": ("dentif",)}, FinishReason.STOP),
        ({"tokens": 3}, FinishReason.LENGTH),
        ({"tokens": 7, "sampling": Sampling(temperature=0, repeat_penalty=1.3)}, FinishReason.LENGTH),
        ({"tokens": 14, "sampling": Sampling(temperature=1.2, top_k=40, seed=11)}, FinishReason.LENGTH),
    ],
    ids=["stop text", "length", "penalty", "temperature"],
)
def test_a_text_that_ends_inside_forced_text(pair: Pair, more: dict[str, Any], finish: FinishReason) -> None:
    assert pair.same(ask(**{"schema": None, "grammar": to_gbnf(ORDER)} | more))[0].finish is finish


def test_a_grammar_that_ends_with_forced_text(pair: Pair) -> None:
    grammar = 'root ::= "The colour of the sky is " ("blue" | "grey") ", says the weather report."'
    found, decodes, without = pair.same(ask("What colour is the sky?", 40, schema=None, grammar=grammar))
    assert found.finish is FinishReason.STOP
    assert found.text.endswith("report.")
    assert decodes < 0.7 * without


def test_a_text_that_is_cancelled_in_forced_text_leaves_nothing(pair: Pair) -> None:
    started = threading.Event()
    grammar = 'root ::= ("a long way to go, and " "no end in sight, " [a-c] " ")+'
    ticket = pair.eager.generate(ask(tokens=800, schema=None, grammar=grammar), lambda _: started.set())
    assert started.wait(60)
    ticket.cancel()
    with pytest.raises(CancelledError):
        ticket.result(60)
    pair.same(ask(tokens=6))
    require_settled(pair.eager)


def forced(pair: Pair, source: str, accepted: str = "", *, has_space: bool = True) -> tuple[bytes, int]:
    """The forced text after a text that is written byte by byte."""
    model = pair.plain._loop.model
    index = FirstByteIndex(model)
    index.prepare()
    compiled: CompiledGrammar = GrammarCache(model, to_gbnf).for_gbnf(source)
    grammar = compiled.new_sampler()
    try:
        for byte in accepted.encode():
            native.accept(grammar, index.token_of_byte[byte])
        text = ForcedText(model, index)
        found = text.after(grammar, lambda _: has_space)
        assert text.after(grammar, lambda _: has_space) == found, "the grammar is only read"
        return found
    finally:
        native.free_sampler(grammar)


@pytest.mark.parametrize(
    ("source", "accepted", "expected"),
    [
        ('root ::= "abc" [x-z]', "", "abc"),
        ('root ::= "abc" [x-z]', "a", "bc"),
        ('root ::= "name" | "names"', "", "name"),
        ('root ::= "one" | "other"', "", "o"),
        ('root ::= "ab" "c"?', "a", "b"),
        ('root ::= "abc"', "abc", ""),
        ('root ::= [a-z]+ "end"', "", ""),
        ('root ::= "größe" [0-9]', "gr", "öße"),
    ],
)
def test_what_a_grammar_forces(pair: Pair, source: str, accepted: str, expected: str) -> None:
    found, certain = forced(pair, source, accepted)
    assert (found, certain) == (expected.encode(), len(expected.encode()))


def test_a_space_that_may_be_left_out_is_predicted_and_known_to_be_uncertain(pair: Pair) -> None:
    source = r'root ::= "\"a\":" " "? "\"" [a-z]'
    assert forced(pair, source) == (b'"a": "', 4)
    assert forced(pair, source, has_space=False) == (b'"a":"', 4)


@pytest.mark.parametrize(("since", "expected"), [(1, b":x"), (100, b": x")])
def test_the_habit_of_spaces_is_that_of_the_newest_tokens(pair: Pair, since: int, expected: bytes) -> None:
    """There was no space after the last colon, so many tokens ago; without a habit a space is predicted."""
    model = pair.plain._loop.model
    index = FirstByteIndex(model)
    index.prepare()
    grammar = GrammarCache(model, to_gbnf).for_gbnf('root ::= ":" " "? "x" [a-z]')
    task = EngineTask(0, GenerateRequest(prompt="-"), (), (), grammar, 0, None, None)
    sampler = new_sampler(model, task, index, 2048)
    before, word = (model.tokenize(text, add_special=False, parse_special=False) for text in ('{"a":"b"', " llama"))
    source, written = ForcedTokens(model), before + word[:1] * since
    tokens, _ = source.tokens(source.look(sampler, written), sampler, written)
    assert b"".join(map(model.piece, tokens)) == expected


def test_what_is_left_of_forced_text_is_known_without_another_walk(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new walk would find it, up to the space that is not certain; and not when something else was written."""
    model, walks = pair.plain._loop.model, []
    index = FirstByteIndex(model)
    index.prepare()
    source = ForcedTokens(model)
    grammar = GrammarCache(model, to_gbnf).for_gbnf(r'root ::= "identification" ":" " "? "x" [a-z]')
    after = ForcedText.after
    monkeypatch.setattr(ForcedText, "after", lambda *given: walks.append(1) or after(*given))
    task = EngineTask(0, GenerateRequest(prompt="-"), (), (), grammar, 0, None, None)
    sampler, look, written = new_sampler(model, task, index, 2048), Look(b"", 0, 0), []
    for byte in b"identification: x":
        look = source.look(sampler, written, look)
        assert look == source.look(sampler, written), "a new walk finds the same"
        native.accept(sampler.grammar, index.token_of_byte[byte])
        written.append(index.token_of_byte[byte])
    assert len(walks) == len(written) + 2, "the first, and after the space"
    other = model.tokenize("zz", add_special=False, parse_special=False)
    assert source.look(sampler, [*written, *other], Look(b"abc", 3, len(written))).text != b"c"


def test_a_grammar_that_takes_long_is_not_followed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair.eager._loop.speculator._forced, "max_seconds", 0.0)
    found, decodes, without = pair.same(ask())
    assert 0 < without - decodes <= found.tokens_accepted < 30


def test_forced_text_is_bounded_and_may_end_inside_a_character(pair: Pair) -> None:
    assert len(forced(pair, f'root ::= "{"ab" * MAX_FORCED}"')[0]) == MAX_FORCED
    assert forced(pair, 'root ::= "caf" ("é" | "è")') == ("café".encode()[:-1], 4)


def test_the_acceptance_of_forced_tokens_is_learned_by_their_place() -> None:
    engine = ForcedRates()
    text = ForcedRates(engine)
    before = [text.rate(place) for place in ForcedPlace]
    for _ in range(30):
        text.record(ForcedPlace.LAST, is_hit=False)
    assert text.rate(ForcedPlace.LAST) < 0.2
    assert [text.rate(place) for place in (ForcedPlace.INNER, ForcedPlace.GUESSED)] == before[:2]
    assert ForcedRates(engine).rate(ForcedPlace.LAST) < 0.3

"""Drafting without a model: predictions, rates, costs, and how many tokens are drafted."""

from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from workers.engine.speculation.acceptance import AcceptanceRates
from workers.engine.speculation.costs import DecodeCosts
from workers.engine.speculation.drafting import MAX_LOSS, Balance, can_gain, plan_drafts
from workers.engine.speculation.lookup import PromptLookup


def test_a_copied_prompt_is_predicted_after_two_tokens() -> None:
    prompt = [*range(100, 140), 1, 2]
    tokens = [*prompt, 110, 111, 112]
    lookup = PromptLookup(tokens, len(prompt))
    outcomes: list[tuple[int, bool]] = []
    lookup.follow(lambda length, hit: outcomes.append((length, hit)))
    assert outcomes == [(2, True)]
    assert lookup.predict(4) == [113, 114, 115, 116]
    tokens.append(7)
    lookup.follow(lambda length, hit: outcomes.append((length, hit)))
    assert outcomes[-1] == (3, False)
    assert not lookup.predict(4)


def test_a_repetition_is_predicted_to_go_on() -> None:
    tokens = [1, 2, 3] * 3
    lookup = PromptLookup(tokens, 4)
    lookup.follow(lambda *_: None)
    assert lookup.predict(7) == [1, 2, 3, 1, 2, 3, 1]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 60), st.integers(1, 9))
def test_a_prediction_follows_the_same_tokens_elsewhere(tokens: list[int], prompt: int, most: int) -> None:
    """What precedes the predicted token equals the end of the text, as far as the match is long."""
    prompt = min(prompt, len(tokens))
    text = tokens[:prompt]
    lookup = PromptLookup(text, prompt)
    for token in [*tokens[prompt:], None]:
        found = lookup.predict(most)
        assert len(found) in (0, most)
        if found:
            end = text[-lookup.length :]
            places = range(lookup.length, len(text))
            assert any(text[at - lookup.length : at] == end and text[at] == found[0] for at in places)
        if token is not None:
            text.append(token)
            lookup.follow(lambda *_: None)


def test_rates_follow_the_text_and_begin_at_those_of_the_engine() -> None:
    engine = AcceptanceRates()
    copying, writing = AcceptanceRates(engine), AcceptanceRates(engine)
    for _ in range(200):
        copying.record(40, is_hit=True)
    assert copying.rate(40) > 0.95
    assert AcceptanceRates(engine).rate(40) > 0.9
    for _ in range(50):
        writing.record(40, is_hit=False)
    assert writing.rate(40) < 0.2
    assert copying.reach(40, 8, 0.1) == sorted(copying.reach(40, 8, 0.1), reverse=True)


def test_drafts_that_fail_lower_what_is_expected_of_later_ones() -> None:
    """Below the rates, which the predictions that were not computed give."""
    engine = AcceptanceRates()
    rates = AcceptanceRates(engine)
    for _ in range(100):
        rates.record(40, is_hit=True)
    before = sum(rates.reach(40, 16, 0))
    for _ in range(6):
        rates.drafted(40, 16, 4)
    assert sum(rates.reach(40, 16, 0)) < 0.6 * before
    assert sum(AcceptanceRates(engine).reach(40, 16, 0)) < 0.8 * before
    for _ in range(100):
        rates.forget_drafts()
        rates.drafted(40, 16, 16)
    assert sum(rates.reach(40, 16, 0)) > 0.95 * before


def costs_of(measured: dict[int, float]) -> DecodeCosts:
    costs = DecodeCosts()
    for tokens, seconds in measured.items():
        for _ in range(9):
            costs.record(tokens, seconds)
    return costs


def drafted(measured: dict[int, float], probability: float, texts: int = 1) -> int:
    """The draft tokens of `texts` equal texts whose every token is accepted with this probability."""
    costs = costs_of(measured)
    base = costs.known(texts)
    assert base is not None
    reach = [probability**place for place in range(1, 17)]
    return sum(plan_drafts([reach] * texts, texts, base / texts, lambda added: costs.more(texts, added), 16))


def test_drafts_depend_on_what_tokens_cost() -> None:
    free = {1: 0.01, 4: 0.0105, 8: 0.011, 16: 0.012}
    dear = {1: 0.01, 2: 0.02, 4: 0.04, 8: 0.08, 16: 0.16}
    assert drafted(free, 0.97) >= 15
    assert 0 < drafted(free, 0.3) < 15
    assert drafted(dear, 0.97) == 0


def test_a_full_machine_gets_no_drafts() -> None:
    """With 32 texts a further token costs as much as one of theirs."""
    measured = {size: 0.003 * size for size in (32, 40, 48)}
    assert drafted(measured, 0.97, texts=32) == 0
    costs = costs_of(measured)
    assert not can_gain(32, 0.003, lambda added: costs.more(32, added), 16)
    free = costs_of({1: 0.01, 8: 0.011})
    assert can_gain(1, 0.01, lambda added: free.more(1, added), 16)


def test_an_unknown_cost_is_tried_and_an_old_one_is_tried_again() -> None:
    assert drafted({1: 0.01}, 0.97) > 0
    costs = costs_of({1: 0.01, 16: 0.2})
    known = costs.more(1, 15)
    for _ in range(10_000):
        costs.record(1, 0.01)
    assert costs.more(1, 15) < 0.5 * known


def test_one_slow_decode_does_not_change_a_cost() -> None:
    costs = costs_of({1: 0.01})
    costs.record(1, 5.0)
    assert costs.known(1) == 0.01


def test_a_machine_that_slows_down_for_a_while_changes_no_cost() -> None:
    """What decides are ratios: a decode with drafts that was measured meanwhile is not dearer."""
    costs = costs_of({1: 0.01, 8: 0.03})
    for _ in range(20):
        costs.record(1, 0.05)
    for _ in range(9):
        costs.record(8, 0.15, has_drafts=True)
    assert costs.known(1) == 0.01
    assert abs(costs.more(1, 7) - 0.02) < 1e-9
    assert costs.pace == 5


def test_gains_are_no_credit_for_losses() -> None:
    """A text that copies does not pay for one that seems to."""
    balance = Balance()
    for _ in range(500):
        balance.decoded(0.01)
        balance.drafted(8, 0.01, 0.02)
    drafts = 0
    while balance.may_draft(0.01):
        balance.decoded(0.03)
        balance.drafted(0, 0.01, 0.02)
        drafts += 1
    assert drafts < 12


def test_lost_time_is_bounded_whatever_is_drafted() -> None:
    """Drafts that are never accepted, taken whenever they may be."""
    balance, lost, total = Balance(), 0.0, 0.0
    for _ in range(20_000):
        may = balance.may_draft(0.01)
        balance.decoded(0.01 + 0.02 * may)
        total += 0.01 + 0.02 * may
        if may:
            balance.drafted(0, 0.01, 0.02)
            lost += 0.02
    assert 0 < lost < 2 * MAX_LOSS * total


def test_room_is_shared_by_probability() -> None:
    counts = plan_drafts([[0.9, 0.8], [0.3], [0.95, 0.9]], 3, 1.0, lambda added: 0.01 * added, 4)
    assert counts == [2, 0, 2]


def test_following_a_token_costs_the_same_in_a_long_text() -> None:
    """Counted in looked-up tokens, not in time: a match is never compared further than its bound."""

    class Counting(list[int]):
        read = 0

        def __getitem__(self, at):  # type: ignore[no-untyped-def] # as that of a list
            Counting.read += 1
            return super().__getitem__(at)

    generator = random.Random(2)
    reads = []
    for size in (500, 5000):
        tokens = Counting(generator.randrange(30) for _ in range(size))
        lookup = PromptLookup(tokens, size)
        Counting.read = 0
        for _ in itertools.repeat(None, 200):
            tokens.append(generator.randrange(30))
            lookup.follow(lambda *_: None)
        reads.append(Counting.read)
    assert reads[1] < 1.5 * reads[0]

"""The number of threads follows what decodes take. The machine is a function from threads to seconds, with noise."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from workers.engine.bindings.first_decodes import choose_threads
from workers.engine.bindings.llama import Context, LlamaModel
from workers.engine.options import EngineOptions
from workers.engine.threads import DecodeKind, DecodeThreads, ThreadChoice, candidates, kind_of

#: Seconds of a token by threads.
Machine = Callable[[int], float]


def quiet(threads: int) -> float:
    return 0.008 / threads**0.8


def busy(threads: int) -> float:
    """Another program has one of two cores."""
    return 0.008 if threads == 1 else 0.16


def many_cores(threads: int) -> float:
    """Eight cores with two hardware threads each."""
    return 0.008 / min(threads, 8) ** 0.9 * (1 + 0.03 * max(0, threads - 8))


def serve(choice: ThreadChoice, machine: Machine, seconds: float, tokens: int = 8, seed: int = 0) -> float:
    """Decode for so long. Returns the time that the best number would have needed, as a part of the time."""
    rng, passed, best = random.Random(seed), 0.0, 0.0
    while passed < seconds:
        count = choice.count(tokens)
        noise = (1 + abs(rng.gauss(0, 0.08))) * (3 if rng.random() < 0.02 else 1)
        took = machine(count) * tokens * noise
        choice.record(tokens, count, took)
        passed += took
        best += min(machine(number) for number in candidates(16)) * tokens * noise
    return best / passed


def test_the_candidates_double_with_one_between() -> None:
    assert candidates(1) == [1]
    assert candidates(2) == [1, 2]
    assert candidates(16) == [1, 2, 3, 4, 6, 8, 12, 16]
    assert candidates(10) == [1, 2, 3, 4, 6, 8, 10]


@pytest.fixture(scope="module")
def model(model_path: Path) -> Iterator[LlamaModel]:
    loaded = LlamaModel(model_path, EngineOptions())
    yield loaded
    loaded.close()


@pytest.mark.parametrize("seed", range(5))
def test_threads_follow_another_program_that_comes_and_goes(seed: int) -> None:
    choice = ThreadChoice(2)
    for machine, number in ((quiet, 2), (busy, 1), (quiet, 2)):
        serve(choice, machine, 30, seed=seed)
        assert choice.chosen == number
    choice = ThreadChoice(2)
    within = {quiet: lambda count: quiet(min(count, 2)), busy: lambda count: busy(min(count, 2))}
    assert serve(choice, within[quiet], 60, seed=seed) > 0.94, "trials on a quiet machine cost little"
    serve(choice, within[busy], 10, seed=seed)
    assert serve(choice, within[busy], 60, seed=seed) > 0.85, "and so they do on a busy one"


@pytest.mark.parametrize("seed", range(5))
def test_the_best_number_of_many_is_found(seed: int) -> None:
    choice = ThreadChoice(16)
    serve(choice, many_cores, 20, seed=seed)
    assert many_cores(choice.chosen) <= many_cores(8) * 1.1
    assert serve(choice, many_cores, 60, seed=seed) > 0.9


@pytest.mark.parametrize(("takes_ties", "chosen"), [(True, 1), (False, 8)])
def test_fewer_threads_win_ties_but_for_prompts(takes_ties: bool, chosen: int) -> None:
    choice = ThreadChoice(8, takes_ties=takes_ties)
    for _ in range(4000):
        choice.record(4, choice.count(4), 0.01)
    assert choice.chosen == chosen


def test_a_trial_compares_decodes_of_equal_size_only() -> None:
    choice = ThreadChoice(2)
    for number in range(200):  # no two decodes in a row have as many tokens
        tokens = 2 + number % 7
        assert choice.count(tokens) == 2
        choice.record(tokens, 2, 0.01 * tokens)
    for _ in range(2):
        choice.record(8, choice.count(8), 0.08)
    assert choice.count(8) == 1


def test_prompts_are_compared_by_the_token_when_their_sizes_are_similar() -> None:
    choice = ThreadChoice(2)
    choice.try_now()
    for _ in range(2):
        choice.record(500, choice.count(500), 5.0)
    assert choice.count(300) == 2
    assert choice.count(480) == 1


def test_a_hopeless_trial_ends_after_one_decode() -> None:
    choice = ThreadChoice(2)
    choice.try_now()
    for _ in range(2):  # the first one may pay for a change
        assert choice.count(8) == 2
        choice.record(8, 2, 0.01)
    assert choice.count(8) == 1
    choice.record(8, 1, 0.1)
    assert (choice.chosen, choice.count(8)) == (2, 2)
    choice.record(8, 2, 0.01)
    assert choice.count(8) == 2


def test_the_limit_is_kept_and_a_larger_one_is_used() -> None:
    choice = ThreadChoice(8)
    choice.limit(2)
    assert choice.chosen == 2
    choice.limit(4)
    assert choice.chosen == 4, "the largest was chosen before"
    serve(choice, lambda threads: 0.001 * threads, 60)
    assert choice.chosen == 1
    choice.limit(16)
    assert choice.chosen == 1, "it was chosen by measurement"


def test_a_slow_first_prompt_does_not_hide_what_is_usual_for_others() -> None:
    choice = ThreadChoice(2)
    choice.try_now()
    for _ in range(2):
        choice.record(512, choice.count(512), 1.0)
    choice.record(512, choice.count(512), 9.0)  # one thread is hopeless
    for _ in range(50):  # parts of 40 tokens take twice as long for each token; that is no reason for a trial
        for tokens in (512, 40):
            assert choice.count(tokens) == 2
            choice.record(tokens, 2, tokens * (0.002 if tokens == 512 else 0.004))


def test_a_number_that_was_chosen_for_other_decodes_is_where_a_kind_begins() -> None:
    threads = DecodeThreads(8, texts=None, prompts=None, is_measured=True)
    for _ in range(1200):
        count = threads.count(DecodeKind.ONE_TEXT, 1)
        threads.record(DecodeKind.ONE_TEXT, 1, count, busy(count))
    assert [threads.chosen(kind) for kind in DecodeKind] == [1, 1, 8]


def test_a_kind_whose_trial_runs_takes_what_was_chosen_for_others() -> None:
    threads = DecodeThreads(2, texts=None, prompts=None, is_measured=True)
    threads.record(DecodeKind.TEXTS, 8, threads.count(DecodeKind.TEXTS, 8), 0.1)  # the first half of a pair
    for _ in range(260):
        count = threads.count(DecodeKind.ONE_TEXT, 1)
        threads.record(DecodeKind.ONE_TEXT, 1, count, busy(count))
    assert threads.chosen(DecodeKind.TEXTS) == 1
    for _ in range(600):
        count = threads.count(DecodeKind.TEXTS, 8)
        threads.record(DecodeKind.TEXTS, 8, count, 8 * quiet(count))
    assert threads.chosen(DecodeKind.TEXTS) == 2, "its own decodes decide then"


def test_the_kind_follows_the_longest_part() -> None:
    assert kind_of(1, 1) is DecodeKind.ONE_TEXT
    assert kind_of(64, 1) is DecodeKind.TEXTS
    assert kind_of(17, 17) is DecodeKind.TEXTS, "a text with drafts"
    assert kind_of(40, 33) is DecodeKind.PROMPTS


def test_a_trial_of_fewer_threads_for_prompts_does_not_make_a_step_longer() -> None:
    threads = DecodeThreads(2, texts=None, prompts=None, is_measured=True)
    tried = 0
    for _ in range(1_000):
        tokens = int(200 * threads.prompt_part)
        count = threads.count(DecodeKind.PROMPTS, tokens)
        seconds = 0.008 / count * tokens
        tried += count == 1
        assert seconds <= 0.8
        threads.record(DecodeKind.PROMPTS, tokens, count, seconds)
    assert tried
    assert threads.prompt_part == 1 == DecodeThreads(2, texts=None, prompts=2, is_measured=True).prompt_part


def test_given_numbers_never_change() -> None:
    threads = DecodeThreads(8, texts=3, prompts=5, is_measured=True)
    threads.limit(1)
    assert [threads.count(kind, 40) for kind in DecodeKind] == [3, 3, 5]
    assert threads.is_settled(DecodeKind.TEXTS)


def test_without_measurement_the_limit_is_used() -> None:
    threads = DecodeThreads(8, texts=None, prompts=None, is_measured=False)
    for _ in range(100):
        assert threads.count(DecodeKind.TEXTS, 8) == 8
        threads.record(DecodeKind.TEXTS, 8, 8, 1.0)
    threads.limit(2)
    assert [threads.count(kind, 8) for kind in DecodeKind] == [2, 2, 2]


def test_texts_and_prompts_are_judged_apart() -> None:
    threads = DecodeThreads(2, texts=None, prompts=None, is_measured=True)
    for _ in range(1200):
        for kind, tokens in zip(DecodeKind, (1, 8, 256), strict=True):
            count = threads.count(kind, tokens)
            threads.record(kind, tokens, count, (quiet if kind is DecodeKind.PROMPTS else busy)(count) * tokens)
    assert [threads.chosen(kind) for kind in DecodeKind] == [1, 1, 2]


def test_a_context_chooses_before_its_first_request_and_is_empty_then(model: LlamaModel) -> None:
    context = Context(model, EngineOptions(slots=4, context=4096, most_threads=2))
    try:
        choose_threads(context, 4, most_seconds=60)
        assert context.threads.is_settled(DecodeKind.TEXTS), "a trial ended"
        assert [context.positions(sequence) for sequence in range(4)] == [(-1, -1)] * 4
    finally:
        context.close()


def test_nothing_is_decoded_to_choose_one_of_one() -> None:
    threads = DecodeThreads(1, texts=None, prompts=None, is_measured=True)
    threads.try_now(DecodeKind.TEXTS)
    assert threads.is_settled(DecodeKind.TEXTS)
    threads.limit(2)
    threads.try_now(DecodeKind.TEXTS)
    assert not threads.is_settled(DecodeKind.TEXTS)


def test_no_time_is_spent_where_a_decode_takes_longer(model: LlamaModel) -> None:
    context = Context(model, EngineOptions(slots=4, context=4096, most_threads=2))
    try:
        choose_threads(context, 4, most_seconds=0)
        assert not context.threads.is_settled(DecodeKind.TEXTS), "a trial is due"
        assert context.positions(0) == (-1, -1)
    finally:
        context.close()


def test_the_reproducible_mode_keeps_its_threads(model: LlamaModel) -> None:
    context = Context(model, EngineOptions(slots=2, context=2048, reproducible=True, most_threads=2))
    try:
        assert context.threads.is_settled(DecodeKind.TEXTS)
        context.threads.limit(1)
        assert context.threads.count(DecodeKind.TEXTS, 2) == 1
    finally:
        context.close()

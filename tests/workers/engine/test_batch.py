"""Batch planning: the content of the next decode, and the next admission."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.inference.requests import GenerateRequest, PriorityClass
from workers.engine import OnPiece, batch
from workers.engine.batch import Admit, BatchWork, Candidate, FreeCapacity, Park, StepPace, Victim
from workers.engine.tasks import EngineTask

INTERACTIVE, STANDARD, BATCH = 0, 1, 2
#: 40 tokens of prompts of the class `batch` in a step.
SLOW = StepPace(prefill_rate=2_000, step_latency=0.04)

works = st.lists(
    st.builds(
        BatchWork,
        id=st.just(0),
        sequence=st.just(0),
        rank=st.sampled_from([INTERACTIVE, STANDARD, BATCH]),
        order=st.integers(0, 100),
        remaining=st.integers(1, 400),
        decoding=st.booleans(),
        latency_sensitive=st.booleans(),
        skipped=st.integers(0, 100),
    ),
    min_size=1,
    max_size=32,
)


def numbered(found: list[BatchWork]) -> list[BatchWork]:
    for number, work in enumerate(found):
        work.id = work.sequence = number
    return found


paces = st.builds(
    StepPace,
    prefill_rate=st.sampled_from([0.0, 1.0, 50.0, 500.0, 50_000.0]),
    decode_rate=st.sampled_from([0.0, 1.0, 50.0, 5_000.0]),
    step_latency=st.sampled_from([None, 0.01, 0.2, 60.0]),
)


@given(works, st.integers(32, 512), paces)
def test_a_decode_contains_every_running_text_within_its_limits(
    found: list[BatchWork], size: int, pace: StepPace
) -> None:
    found = numbered(found)
    chunks = batch.plan_decode(found, size, pace)
    assert chunks
    assert sum(chunk.count for chunk in chunks) <= size
    assert [chunk.work.sequence for chunk in chunks] == sorted({chunk.work.sequence for chunk in chunks})
    assert all(1 <= chunk.count <= chunk.work.remaining for chunk in chunks)
    assert all(chunk.is_last == (chunk.count == chunk.work.remaining) for chunk in chunks)
    interactive = any(work.rank == INTERACTIVE for work in found)
    taking_part = [work for work in found if not interactive or work.rank != BATCH or work.skipped >= batch.BATCH_EVERY]
    texts = [work for work in taking_part if work.decoding and work.remaining == 1]
    decoding = {work.id for work in texts}
    assert decoding <= {chunk.work.id for chunk in chunks} <= {work.id for work in taking_part}
    prompts = sum(chunk.count for chunk in chunks if chunk.work.id not in decoding)
    of_batch = sum(chunk.count for chunk in chunks if chunk.work.id not in decoding and chunk.work.rank == BATCH)
    batch_limit = pace.tokens(min(batch.BATCH_LATENCY, pace.step_latency or 1))
    batch_limit = max(1, batch_limit // 4) if interactive else batch_limit
    assert of_batch <= batch_limit
    waiting = [work for work in taking_part if work.id not in decoding]
    if waiting and any(work.latency_sensitive for work in texts):
        assert prompts <= batch.prefill_tokens(texts, waiting, size, pace)
    else:
        wanted = sum(work.remaining for work in waiting if work.rank != BATCH)
        wanted += min(batch_limit, sum(work.remaining for work in waiting if work.rank == BATCH))
        assert prompts == min(size - len(decoding), wanted)


@given(works, st.integers(32, 512), paces, st.booleans())
def test_the_decodes_of_a_step_have_each_chunk_once(
    found: list[BatchWork], size: int, pace: StepPace, apart: bool
) -> None:
    chunks = batch.plan_decode(numbered(found), size, pace)
    decodes = batch.decodes_of(chunks, apart=apart)
    assert all(decodes)
    assert sorted(chunk.work.id for part in decodes for chunk in part) == sorted(chunk.work.id for chunk in chunks)
    assert len(decodes) == 1 or apart


def test_texts_of_batches_stand_still_while_an_interactive_request_runs() -> None:
    """They take part in one decode of many, so that they do not starve, and their prompts in small parts."""
    text, prompt = BatchWork(1, 0, BATCH, 1, 1, decoding=True), BatchWork(2, 1, BATCH, 2, 400)
    standard = BatchWork(3, 2, STANDARD, 3, 1, decoding=True)
    urgent = BatchWork(4, 3, INTERACTIVE, 4, 1, decoding=True, latency_sensitive=True)
    works = [text, prompt, standard, urgent]
    seen: dict[int, int] = dict.fromkeys([1, 2, 3, 4], 0)
    for _ in range(10 * (batch.BATCH_EVERY + 1)):
        chunks = batch.plan_decode(works, 512, SLOW)
        batch.count_skips(works, chunks)
        for chunk in chunks:
            seen[chunk.work.id] += chunk.count
    decodes = 10 * (batch.BATCH_EVERY + 1)
    assert seen == {1: 10, 2: 10 * 10, 3: decodes, 4: decodes}

    works.remove(urgent)
    assert [(chunk.work.id, chunk.count) for chunk in batch.plan_decode(works, 512, SLOW)] == [
        (1, 1),
        (2, 40),
        (3, 1),
    ]


def test_prompts_are_limited_only_for_latency_sensitive_texts() -> None:
    text, prompt = BatchWork(1, 0, STANDARD, 1, 1, decoding=True), BatchWork(2, 1, STANDARD, 2, 400)
    assert [chunk.count for chunk in batch.plan_decode([text, prompt], 512, StepPace(400, 40, 0.2))] == [1, 400]
    text.latency_sensitive = True
    assert [chunk.count for chunk in batch.plan_decode([text, prompt], 512, StepPace(400, 40, 0.2))] == [1, 80]


@pytest.mark.parametrize(
    ("priority", "reader", "latency_sensitive"),
    [
        (PriorityClass.INTERACTIVE, None, True),
        (PriorityClass.STANDARD, None, False),
        (PriorityClass.STANDARD, print, True),
        (PriorityClass.BATCH, None, False),
    ],
)
def test_streamed_and_interactive_requests_are_latency_sensitive(
    priority: PriorityClass, reader: OnPiece | None, latency_sensitive: bool
) -> None:
    request = GenerateRequest(prompt="a", priority=priority)
    assert EngineTask(1, request, (1,), (), None, 1, None, reader).latency_sensitive == latency_sensitive


def test_the_best_class_is_computed_first_unless_another_starves() -> None:
    long, urgent = BatchWork(1, 0, STANDARD, 1, 100), BatchWork(2, 1, INTERACTIVE, 2, 100)
    assert [chunk.work.id for chunk in batch.plan_decode([long, urgent], 64, StepPace())] == [2]
    long.skipped = batch.STARVED
    assert [chunk.work.id for chunk in batch.plan_decode([long, urgent], 64, StepPace())] == [1]


@given(works, st.integers(1, 64))
def test_reproducible_decodes_contain_one_request_and_alternate(found: list[BatchWork], size: int) -> None:
    found = numbered(found)
    for work in found:
        work.skipped = 0
    served = []
    for _ in found:
        chunks = batch.plan_reproducible(found, size)
        assert len(chunks) == 1
        assert chunks[0].count == min(size, chunks[0].work.remaining)
        batch.count_skips(found, chunks)
        served.append(chunks[0].work.id)
    assert sorted(served) == [work.id for work in found]


def test_a_step_latency_bounds_the_prompts_of_a_step() -> None:
    text = BatchWork(1, 0, STANDARD, 1, 1, decoding=True, latency_sensitive=True)
    prompt = BatchWork(2, 1, STANDARD, 2, 400)
    for rate, latency, tokens in ((400, 0.2, 80), (1_000, 0.2, 200), (1_000, 0.01, 16), (1, 0.2, 16)):
        assert batch.prefill_tokens([text], [prompt], 512, StepPace(rate, 40, latency)) == tokens
    assert batch.prefill_tokens([text], [prompt], 512, StepPace(1_000, 40, 0.2, prompt_part=0.5)) == 100


@given(st.integers(1, 20_000), st.integers(1, 8), st.integers(1, 2_000), st.booleans())
def test_the_share_of_prompts_is_whole_tiles_unless_it_is_less_than_half_a_tile(
    rate: int, count: int, remaining: int, apart: bool
) -> None:
    texts = [BatchWork(n, n, STANDARD, n, 1, decoding=True, latency_sensitive=True) for n in range(count)]
    prompt = [BatchWork(9, 9, STANDARD, 9, remaining)]
    tokens = batch.prefill_tokens(texts, prompt, 512, StepPace(rate, 40), apart=apart)
    assert tokens <= batch.TILE // 2 or tokens % batch.TILE == (0 if apart else 1)
    seconds = batch.prefill_seconds(count / 40, remaining / rate, 512 / rate, STANDARD, STANDARD)
    assert abs(tokens - max(batch.MIN_PREFILL_TOKENS, int(rate * seconds))) <= batch.TILE // 2 + 1


@given(st.floats(0.001, 10), st.sampled_from([0, 1, 2]), st.sampled_from([0, 1, 2]))
def test_the_share_of_prompts_follows_the_speed_of_the_machine(texts: float, prompt: int, reader: int) -> None:
    """Four times as slow a machine has gaps twice as long; a more urgent prompt never gets less."""
    seconds = batch.prefill_seconds(texts, 0.0, 0.0, prompt, reader)
    assert batch.prefill_seconds(4 * texts, 0.0, 0.0, prompt, reader) == pytest.approx(2 * seconds)
    if prompt:
        assert batch.prefill_seconds(texts, 0.0, 0.0, prompt - 1, reader) > seconds
    if reader:
        assert batch.prefill_seconds(texts, 0.0, 0.0, prompt, reader - 1) < seconds


def test_a_long_queue_of_prompts_gets_a_part_of_it_in_a_step() -> None:
    assert batch.prefill_seconds(0.01, 12.0, 60.0, STANDARD, STANDARD) == 6
    assert batch.prefill_seconds(0.01, 12.0, 60.0, STANDARD, INTERACTIVE) == pytest.approx(1)
    assert batch.prefill_seconds(0.01, 12.0, 60.0, INTERACTIVE, STANDARD) == 6


@given(st.floats(0.001, 1), st.floats(0, 1_000), st.floats(0.001, 100), st.sampled_from([0, 1, 2]))
def test_a_queue_of_prompts_makes_a_step_take_a_third_of_that_of_a_full_batch_at_most(
    texts: float, backlog: float, full: float, rank: int
) -> None:
    alone = batch.prefill_seconds(texts, 0.0, full, rank, STANDARD)
    seconds = batch.prefill_seconds(texts, backlog, full, rank, STANDARD)
    assert seconds == alone or alone < seconds <= (full + texts) / 3 - texts


def test_a_short_prompt_goes_first_unless_the_long_one_has_waited_longer_by_three_times_the_difference() -> None:
    long, short = BatchWork(1, 0, STANDARD, 1, 400, submitted=10.0), BatchWork(2, 1, STANDARD, 2, 100)
    pace = StepPace(prefill_rate=100)  # the long one takes three seconds more
    for submitted, first in ((10.0, 2), (18.9, 2), (19.1, 1)):
        short.submitted = submitted
        chunks = batch.plan_decode([long, short], 64, pace)
        assert [chunk.work.id for chunk in chunks] == [first]


def test_long_prompts_are_decoded_apart_from_texts_where_that_is_faster() -> None:
    text, prompt = BatchWork(1, 0, STANDARD, 1, 1, decoding=True), BatchWork(2, 1, STANDARD, 2, 400)
    chunks = batch.plan_decode([text, prompt], 512, StepPace())
    assert batch.decodes_of(chunks, apart=False) == [chunks]
    assert [[chunk.work.id for chunk in part] for part in batch.decodes_of(chunks, apart=True)] == [[1], [2]]
    prompt.remaining = batch.APART_TOKENS - 1
    chunks = batch.plan_decode([text, prompt], 512, StepPace())
    assert batch.decodes_of(chunks, apart=True) == [chunks]


def test_no_request_overtakes_one_that_waits_for_room() -> None:
    candidates = [Candidate(1, STANDARD, 100), Candidate(2, STANDARD, 10)]
    assert batch.next_admission(candidates, [], FreeCapacity(4, 50)) is None
    assert batch.next_admission(candidates, [], FreeCapacity(4, 100)) == Admit(1)


def test_a_request_that_waits_for_a_prefix_is_deferred() -> None:
    candidates = [Candidate(1, STANDARD, 100, deferred=True), Candidate(2, STANDARD, 10)]
    assert batch.next_admission(candidates, [], FreeCapacity(4, 50)) == Admit(2)


def test_only_an_interactive_request_parks_others_and_only_when_it_helps() -> None:
    victims = [Victim(7, progress=50, order=1, cells=30), Victim(8, progress=5, order=2, cells=30)]
    assert batch.next_admission([Candidate(1, STANDARD, 10)], victims, FreeCapacity(0, 50)) is None
    assert batch.next_admission([Candidate(1, INTERACTIVE, 10)], victims, FreeCapacity(0, 50)) == Park(8)
    assert batch.next_admission([Candidate(1, INTERACTIVE, 110)], victims, FreeCapacity(1, 50)) == Park(8)
    assert batch.next_admission([Candidate(1, INTERACTIVE, 111)], victims, FreeCapacity(1, 50)) is None
    assert batch.next_admission([Candidate(1, INTERACTIVE, 10)], [], FreeCapacity(0, 50)) is None


@given(st.integers(0, 2), st.floats(0, 1e6))
def test_waiting_raises_the_class_but_no_batch_gets_before_an_interactive_request(rank: int, waited: float) -> None:
    best = STANDARD if rank == BATCH else INTERACTIVE
    assert batch.effective_rank(rank, waited, 30) == max(best, rank - int(waited // 30))

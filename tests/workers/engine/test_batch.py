"""What the next decode holds, and who comes in next."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.inference.requests import GenerateRequest, PriorityClass
from workers.engine import batch
from workers.engine.batch import Admit, BatchRoom, BatchWork, Candidate, Park, Victim
from workers.engine.tasks import EngineTask, OnText

INTERACTIVE, STANDARD, BATCH = 0, 1, 2

works = st.lists(
    st.builds(
        BatchWork,
        id=st.just(0),
        sequence=st.just(0),
        rank=st.sampled_from([INTERACTIVE, STANDARD, BATCH]),
        order=st.integers(0, 100),
        left=st.integers(1, 400),
        writing=st.booleans(),
        watched=st.booleans(),
        waited=st.integers(0, 100),
    ),
    min_size=1,
    max_size=32,
)


def numbered(found: list[BatchWork]) -> list[BatchWork]:
    for number, work in enumerate(found):
        work.id = work.sequence = number
    return found


@given(works, st.integers(32, 512), st.integers(1, 512))
def test_a_decode_holds_every_text_and_no_more_than_it_may(found: list[BatchWork], size: int, budget: int) -> None:
    found = numbered(found)
    pieces = batch.plan_decode(found, size, budget)
    assert pieces
    assert sum(piece.count for piece in pieces) <= size
    assert [piece.work.sequence for piece in pieces] == sorted({piece.work.sequence for piece in pieces})
    assert all(1 <= piece.count <= piece.work.left for piece in pieces)
    assert all(piece.ends == (piece.count == piece.work.left) for piece in pieces)
    writing = {work.id for work in found if work.writing and work.left == 1}
    assert writing <= {piece.work.id for piece in pieces}
    prompts = sum(piece.count for piece in pieces if piece.work.id not in writing)
    if any(work.id in writing and work.watched for work in found):
        assert prompts <= budget
    elif len(writing) < len(found):
        assert prompts == min(size - len(writing), sum(work.left for work in found if work.id not in writing))


def test_prompts_are_held_back_only_for_texts_that_somebody_watches() -> None:
    text, prompt = BatchWork(1, 0, STANDARD, 1, 1, writing=True), BatchWork(2, 1, STANDARD, 2, 400)
    assert [piece.count for piece in batch.plan_decode([text, prompt], 512, 80)] == [1, 400]
    text.watched = True
    assert [piece.count for piece in batch.plan_decode([text, prompt], 512, 80)] == [1, 80]


@pytest.mark.parametrize(
    ("priority", "reader", "watched"),
    [
        (PriorityClass.INTERACTIVE, None, True),
        (PriorityClass.STANDARD, None, False),
        (PriorityClass.STANDARD, print, True),
        (PriorityClass.BATCH, None, False),
    ],
)
def test_who_reads_along_and_every_interactive_asker_watches(
    priority: PriorityClass, reader: OnText | None, watched: bool
) -> None:
    request = GenerateRequest(prompt="a", priority=priority)
    assert EngineTask(1, request, (1,), (), None, 1, None, reader).watched == watched


def test_the_best_class_is_computed_first_unless_another_starved() -> None:
    long, urgent = BatchWork(1, 0, BATCH, 1, 100), BatchWork(2, 1, INTERACTIVE, 2, 100)
    assert [piece.work.id for piece in batch.plan_decode([long, urgent], 64, 64)] == [2]
    long.waited = batch.STARVED
    assert [piece.work.id for piece in batch.plan_decode([long, urgent], 64, 64)] == [1]


@given(works, st.integers(1, 64))
def test_reproducible_decodes_hold_one_request_and_all_take_turns(found: list[BatchWork], size: int) -> None:
    found = numbered(found)
    for work in found:
        work.waited = 0
    served = []
    for _ in found:
        pieces = batch.plan_alone(found, size)
        assert len(pieces) == 1
        assert pieces[0].count == min(size, pieces[0].work.left)
        batch.note_turns(found, pieces)
        served.append(pieces[0].work.id)
    assert sorted(served) == [work.id for work in found]


def test_the_budget_of_a_step_follows_the_speed_of_the_machine() -> None:
    assert batch.prefill_budget(400, 0.2, 16, 512) == 80
    assert batch.prefill_budget(100_000, 0.2, 16, 512) == 512
    assert batch.prefill_budget(1, 0.2, 16, 512) == 16


def test_nobody_overtakes_a_request_that_waits_for_room() -> None:
    candidates = [Candidate(1, STANDARD, 100), Candidate(2, STANDARD, 10)]
    assert batch.next_admission(candidates, [], BatchRoom(4, 50)) is None
    assert batch.next_admission(candidates, [], BatchRoom(4, 100)) == Admit(1)


def test_a_request_that_waits_for_a_prefix_stands_aside() -> None:
    candidates = [Candidate(1, STANDARD, 100, aside=True), Candidate(2, STANDARD, 10)]
    assert batch.next_admission(candidates, [], BatchRoom(4, 50)) == Admit(2)


def test_only_an_interactive_request_parks_and_only_when_it_helps() -> None:
    victims = [Victim(7, progress=50, order=1, cells=30), Victim(8, progress=5, order=2, cells=30)]
    assert batch.next_admission([Candidate(1, STANDARD, 10)], victims, BatchRoom(0, 50)) is None
    assert batch.next_admission([Candidate(1, INTERACTIVE, 10)], victims, BatchRoom(0, 50)) == Park(8)
    assert batch.next_admission([Candidate(1, INTERACTIVE, 110)], victims, BatchRoom(1, 50)) == Park(8)
    assert batch.next_admission([Candidate(1, INTERACTIVE, 111)], victims, BatchRoom(1, 50)) is None
    assert batch.next_admission([Candidate(1, INTERACTIVE, 10)], [], BatchRoom(0, 50)) is None


@given(st.integers(0, 2), st.floats(0, 1e6))
def test_waiting_raises_the_class_until_it_is_the_first(rank: int, waited: float) -> None:
    assert batch.effective_rank(rank, waited, 30) == max(0, rank - int(waited // 30))

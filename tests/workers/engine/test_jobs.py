"""The order of the engine's jobs: by class, and within a class as they came."""

from __future__ import annotations

import threading
from collections.abc import Callable

from app.inference.requests import EmbedRequest, PriorityClass
from workers.engine.embedding import EmbeddingJob
from workers.engine.engine import LlamaEngine
from workers.engine.waiting import Job, Jobs

BATCH, STANDARD, INTERACTIVE = PriorityClass.BATCH, PriorityClass.STANDARD, PriorityClass.INTERACTIVE


def job() -> Job:
    return lambda _: False


def test_jobs_are_in_the_order_of_their_classes() -> None:
    jobs = Jobs()
    given = [(job(), one) for one in (BATCH, STANDARD, BATCH, INTERACTIVE, STANDARD, INTERACTIVE)]
    for one, priority in given:
        jobs.add(one, priority)
    assert list(jobs) == [given[at][0] for at in (3, 5, 1, 4, 0, 2)]


def test_a_change_of_the_engine_keeps_its_place() -> None:
    """What began before the adapters change is computed with the old ones, whatever comes later."""
    jobs = Jobs()
    before, change, after = job(), job(), job()
    jobs.add(before, BATCH)
    jobs.add(change, None)
    jobs.add(after, INTERACTIVE)
    assert list(jobs) == [before, change, after]


def test_a_job_that_is_done_is_removed_also_behind_a_newer_one() -> None:
    jobs = Jobs()
    first, newer = job(), job()
    jobs.add(first, BATCH)
    running = jobs.first()
    jobs.add(newer, INTERACTIVE)
    jobs.remove(running)
    assert list(jobs) == [newer]


def test_interactive_embeddings_do_not_wait_for_those_of_batches(shared: LlamaEngine) -> None:
    ended: list[str] = []
    holds, may_go_on = threading.Event(), threading.Event()

    def hold(_: bool) -> bool:
        holds.set()
        assert may_go_on.wait(60)
        return False

    def queues(cancel: Callable[[], None], name: str, queued: threading.Event) -> None:
        computed: EmbeddingJob = cancel.__self__  # type: ignore[attr-defined] # a method of the job
        computed.future.add_done_callback(lambda _: ended.append(name))
        queued.set()

    def embed(name: str, priority: PriorityClass, queued: threading.Event) -> None:
        request = EmbedRequest((f"a text of {name}",), priority=priority)
        shared.embed(request, 60, lambda cancel: queues(cancel, name, queued))

    shared._loop.submit_job(hold)
    assert holds.wait(60)
    threads = []
    for name, priority in (("batch", BATCH), ("standard", STANDARD), ("interactive", INTERACTIVE)):
        queued = threading.Event()
        threads.append(threading.Thread(target=embed, args=(name, priority, queued)))
        threads[-1].start()
        assert queued.wait(60)
    may_go_on.set()
    for thread in threads:
        thread.join(60)
    assert ended == ["interactive", "standard", "batch"]

"""Calls that wait: what they are told, and their deadlines. Postgres and Valkey are real, the engine is simulated."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncGenerator
from datetime import timedelta
from typing import Any

import httpx2
import pytest

from app.api.openai.deadlines import CallDeadline, deadline_of, within
from app.api.openai.errors import DeadlineUnmet
from app.api.openai.road import Waiting
from app.inference import queues, waiting
from app.inference.token_stream import EntryKind, StreamEntry
from app.inference.waiting import ModelQueue
from app.kernel.database import Database
from app.kernel.errors import InvalidInput
from app.workflows.runs import views
from tests.api.openai.conftest import MODEL, StartPool, catalog
from tests.api.openai.test_chat_completions import PATIENCE, body, until_state

RUNS = ["a", "b", "c", "d"]


def post(api: str, wait: str, **more: Any) -> httpx2.Response:
    return httpx2.post(f"{api}/v1/chat/completions", json=body(**more), headers={"Prefer": wait}, timeout=PATIENCE)


def queue(**more: Any) -> ModelQueue:
    return ModelQueue(MODEL, **{"runs": {run: n for n, run in enumerate(RUNS, 1)}, "waiting": 4, **more})


def test_a_call_waits_for_those_before_it_on_all_slots() -> None:
    found = waiting.estimate(queue(slots=2, duration=6.0), RUNS[3])
    assert (found.position, found.waiting, found.seconds, found.is_coming) == (4, 4, 12.0, True)
    assert found.detail == f"waiting for {MODEL}: position 4 of 4, all its slots are taken; about 12 s"


def test_a_cold_model_is_loaded_first() -> None:
    starting = queue(starts_in=8.0, loaded=0.4, slots_per_pool=2, duration=6.0)
    assert waiting.estimate(starting, RUNS[0]).seconds == 8.0
    assert waiting.estimate(starting, RUNS[2]).seconds == 14.0
    assert "it is loading, 40%" in waiting.estimate(starting, RUNS[0]).detail
    cold = waiting.estimate(queue(load=5.0), RUNS[0])
    assert (cold.seconds, cold.is_coming) == (5.0, False)


def test_what_nobody_knows_is_no_estimate() -> None:
    found = waiting.estimate(queue(refusal="needs 6 GiB, gpu-0 has 4 GiB"), RUNS[0])
    assert (found.seconds, found.is_coming) == (None, False)
    assert found.detail.endswith(f"needs 6 GiB, gpu-0 has 4 GiB; see: arriero fleet why {MODEL}")
    assert found.outline.endswith(f"no pool of it can be started now; see: arriero fleet why {MODEL}")


def test_a_new_call_goes_behind_the_interactive_ones() -> None:
    assert waiting.estimate(queue(slots=1, before_new=2, duration=3.0), None).seconds == 9.0
    assert waiting.estimate(ModelQueue(MODEL, slots=1), None).seconds == 0.0


@pytest.mark.parametrize("wrong", ["wait=soon", "wait=0", "wait=86401", "wait=-1", "wait=1.5", "wait"])
def test_a_wrong_wait_is_refused_or_ignored(wrong: str) -> None:
    if wrong == "wait":
        assert deadline_of(wrong, "interactive", timedelta(0)) == CallDeadline(None)
        return
    with pytest.raises(InvalidInput, match="whole seconds from 1 to 86400"):
        deadline_of(wrong, "interactive", timedelta(0))


def test_the_setting_is_for_interactive_calls() -> None:
    default = timedelta(minutes=1)
    assert deadline_of(None, "interactive", default) == CallDeadline(60)
    assert deadline_of(None, "batch", default) == CallDeadline(None)
    assert deadline_of("respond-async, wait=10", "batch", default) == CallDeadline(10, is_preferred=True)


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_no_model_begins_in_time_is_refused(api: str, database: Database, stream: bool) -> None:
    began = time.monotonic()
    answer = post(api, "wait=1", stream=stream)
    assert time.monotonic() - began >= 1
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["Retry-After"]) >= 1
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("deadline_exceeded", "server_error")
    assert "within 1 s" in error["message"]
    until_state(database, views.page(database, limit=1).runs[0].id, "cancelled")


def test_a_call_that_begins_in_time_has_all_the_time(api: str, start_pool: StartPool) -> None:
    start_pool(tokens_per_second=5)
    answer = post(api, "wait=1", max_tokens=10)
    assert answer.status_code == 200, answer.text
    assert answer.headers["Preference-Applied"] == "wait=1"
    assert answer.json()["usage"]["completion_tokens"] == 10


def test_a_wrong_header_is_named(api: str) -> None:
    answer = post(api, "wait=soon")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "Prefer"


def test_waiting_calls_are_told_their_positions(api: str, start_pool: StartPool, database: Database) -> None:
    """Without a pool they wait as runs; the second one is behind the first."""
    leave = threading.Event()
    told: list[list[str]] = [[], []]

    def wait(own: list[str]) -> None:
        with (
            httpx2.Client(timeout=PATIENCE) as client,
            client.stream("POST", f"{api}/v1/chat/completions", json=body(stream=True)) as answer,
        ):
            for line in answer.iter_lines():
                if line.startswith(": "):
                    own.append(line)
                if leave.is_set():
                    return

    threads = [threading.Thread(target=wait, args=(own,)) for own in told]
    threads[0].start()
    limit = time.monotonic() + PATIENCE
    while not views.page(database, limit=1).runs:
        assert time.monotonic() < limit
        threading.Event().wait(0.02)
    threads[1].start()
    while not any("position 1 of 2" in line for line in told[0]) or not any(
        "position 2 of 2" in line for line in told[1]
    ):
        assert time.monotonic() < limit, told
        threading.Event().wait(0.05)
    leave.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert all(re.match(rf": waiting for {MODEL}: position \d of \d, it is not loaded; ", line) for line in told[0])


def test_the_queues_of_many_models_are_one_read(api: str, database: Database) -> None:
    models = list(catalog().models)
    found = queues.read(database, models)
    assert set(found) == {model.name for model in models}
    assert all(one.waiting == 0 and one.slots == 0 for one in found.values())


def test_a_known_wait_is_refused_at_once_for_a_client_with_a_deadline() -> None:
    async def source() -> AsyncGenerator[StreamEntry | Waiting]:
        yield Waiting("waiting for a model", seconds=40.0)
        yield StreamEntry("1-1", EntryKind.BEGUN, "a-pool")

    async def entries(deadline: CallDeadline) -> int:
        return len([entry async for entry in within(deadline, source())])

    with pytest.raises(DeadlineUnmet, match="not expected to begin within 30 s; waiting for a model") as refused:
        asyncio.run(entries(CallDeadline(30, is_preferred=True)))
    assert refused.value.retry_after == 10
    assert asyncio.run(entries(CallDeadline(60, is_preferred=True))) == 2
    assert asyncio.run(entries(CallDeadline(30))) == 2, "the setting refuses nothing early"


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_has_a_deadline_too(api: str, stream: bool) -> None:
    content = {"model": MODEL, "input": "Hello.", "stream": stream}
    answer = httpx2.post(f"{api}/v1/responses", json=content, headers={"Prefer": "wait=1"}, timeout=PATIENCE)
    assert answer.status_code == 503, answer.text
    assert answer.json()["error"]["code"] == "deadline_exceeded"


def test_a_response_in_the_background_waits_for_as_long_as_it_takes(api: str) -> None:
    content = {"model": MODEL, "input": "Hello.", "background": True}
    answer = httpx2.post(f"{api}/v1/responses", json=content, headers={"Prefer": "wait=1"}, timeout=PATIENCE)
    assert (answer.status_code, answer.json()["status"]) == (200, "queued")
    assert "Preference-Applied" not in answer.headers

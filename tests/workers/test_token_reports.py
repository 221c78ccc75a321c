"""Token reports: what a pool says of the texts that it writes, and what the API shows of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import redis

from app.api.workflows import run_documents
from app.catalog.catalog import Catalog
from app.kernel import clock
from app.kernel.activity import Activity
from app.kernel.broker import CeleryPublisher, celery_app
from app.kernel.sections.servers import BrokerSettings
from app.kernel.security.secrets import Secrets
from app.kernel.settings import Settings
from app.scheduler.wake_up import AgentCalls
from app.workflows.runs import live_tokens, views
from app.workflows.runs.claims import Claim
from app.workflows.runs.live_tokens import LiveTokens
from app.workflows.runs.service import Runs
from app.workflows.state_machine.outcomes import Success, TokenUsage
from tests.workflows.conftest import StepWorker
from workers.engine.engine import LlamaEngine
from workers.leases import Leases
from workers.runtime import Runtime
from workers.steps import run_step
from workers.token_reports import TokenReports

ONE = """
workflow: w
steps:
  - {id: write, kind: generate, model: "m:1", prompt: Once upon a time, max_tokens: 3000, sampling: {temperature: 0}}
"""
MAP = """
workflow: w
steps:
  - id: each
    kind: map
    over: "[1, 2, 3]"
    max_parallel: 2
    step: {kind: generate, model: "m:1", prompt: "{{ item }}"}
"""
OWNER, PATIENCE = "pool@here/1/abc", 60


class Text:
    """A text that is being written: the reports read it, and the test waits for them."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self._asked = tokens, threading.Semaphore(0)

    def written(self) -> int:
        self._asked.release()
        return self.tokens

    def reported(self, times: int) -> None:
        """Wait until the reports before this number have been written."""
        for _ in range(times):
            assert self._asked.acquire(timeout=PATIENCE)


@pytest.fixture
def worker(runs: Runs) -> StepWorker:
    return StepWorker(runs)


@pytest.fixture
def reports(publisher: CeleryPublisher) -> Iterator[TokenReports]:
    made = TokenReports(interval=0.02)
    made.start(publisher, OWNER)
    yield made
    made.close()


def claimed(worker: StepWorker, source: str = ONE, key: str = "write") -> Claim:
    run_id = worker.submit(source)
    if key != "write":
        worker.do(worker.claim("each", run_id), {})
    return worker.claim(key, run_id)


def shown(worker: StepWorker, publisher: CeleryPublisher, run_id: UUID) -> Any:
    """The first step as the API shows it."""
    view = views.run(worker.runs.database, run_id)
    return (
        run_documents.out(view, run_documents.live_of(view, worker.runs.database, publisher), sees_fleet=True)
        .steps[0]
        .live
    )


def test_a_running_step_shows_its_tokens_and_their_rate_and_nothing_after_its_end(
    worker: StepWorker, publisher: CeleryPublisher, reports: TokenReports, valkey: redis.Redis
) -> None:
    claim, text = claimed(worker), Text(40)
    with reports.watch(claim, text.written):
        text.reported(2)
        text.tokens = 90
        text.reported(3)
        live = shown(worker, publisher, claim.run_id)
        assert live.tokens_out == 90
        assert live.tokens_per_s > 0
        assert 0 < int(valkey.ttl(live_tokens.key_of(claim.run_id))) <= live_tokens.LIFE.total_seconds()  # type: ignore[arg-type] # the stubs of redis know awaitable answers too
    reports.close()
    last = TokenReports(interval=0.01)
    assert last._report(publisher, OWNER, {claim.run_id}) == set()
    assert shown(worker, publisher, claim.run_id) is None


def test_a_map_shows_the_sum_of_its_items(worker: StepWorker, publisher: CeleryPublisher) -> None:
    first = claimed(worker, MAP, "each[0]")
    worker.claim("each[1]", first.run_id)
    steps = {"each[0]": LiveTokens(1, 30, 10.0), "each[2]": LiveTokens(1, 5, 1.0)}
    live_tokens.write(publisher, OWNER, {first.run_id: steps}, (), clock.now())
    live_tokens.write(publisher, "other@here/2/x", {first.run_id: {"each[1]": LiveTokens(1, 12)}}, (), clock.now())

    assert shown(worker, publisher, first.run_id) == run_documents.LiveOut(tokens_out=42, tokens_per_s=10.0)
    worker.runs.succeed(first, worker.owner, Success("one", TokenUsage(3, 31)))
    assert shown(worker, publisher, first.run_id).tokens_out == 12, "what has ended is counted with the map"
    assert worker.step(first.run_id, "each").tokens_out == 31


@pytest.mark.parametrize("case", ["an earlier attempt", "a dead pool", "malformed", "too many"])
def test_what_is_out_of_date_or_malformed_is_not_shown(
    worker: StepWorker, publisher: CeleryPublisher, valkey: redis.Redis, case: str
) -> None:
    claim = claimed(worker)
    attempt = 7 if case == "an earlier attempt" else 1
    age = live_tokens.LIFE * 2 if case in ("a dead pool", "malformed") else timedelta(0)
    steps = {"write": LiveTokens(attempt, 30, 10.0)}
    if case == "too many":
        steps |= {f"each[{i}]": LiveTokens(1, 1) for i in range(20_000)}
    live_tokens.write(publisher, OWNER, {claim.run_id: steps}, (), clock.now() - age)
    if case == "malformed":
        for i, text in enumerate(("[", "[1]", "{}", '[1e999, {"write": [1, 2, 3]}]', "[" * 99_999, '["a", 1]')):
            valkey.hset(live_tokens.key_of(claim.run_id), str(i), text)

    assert shown(worker, publisher, claim.run_id) is None


def test_without_redis_a_run_is_shown_without_them(worker: StepWorker) -> None:
    claim = claimed(worker)
    nowhere = "redis://127.0.0.1:1/0"
    gone = CeleryPublisher(celery_app(nowhere, BrokerSettings()), nowhere)

    assert shown(worker, gone, claim.run_id) is None
    reports, text = TokenReports(interval=0.01), Text(5)
    reports.start(gone, OWNER)
    with reports.watch(claim, text.written):
        text.reported(3)
    reports.close()
    gone.close()


def test_a_process_without_running_texts_sends_nothing(publisher: CeleryPublisher, valkey: redis.Redis) -> None:
    reports = TokenReports()
    publisher.ping()
    before = valkey.info("stats")["total_commands_processed"]  # type: ignore[index] # as above

    assert reports._report(publisher, OWNER, set()) == set()
    assert valkey.info("stats")["total_commands_processed"] == before + 1, "the count itself"  # type: ignore[index] # as above


@pytest.mark.slow
def test_a_real_engine_reports_while_it_writes(
    worker: StepWorker, publisher: CeleryPublisher, shared: LlamaEngine, tmp_path: Path
) -> None:
    run_id = worker.submit(ONE)
    leases = Leases(worker.runs, OWNER, interval=timedelta(seconds=1))
    leases.start()
    reports = TokenReports(interval=0.05)
    reports.start(publisher, OWNER)
    runtime = Runtime(
        Settings(),
        worker.runs,
        leases,
        shared,
        Secrets(tmp_path),
        Catalog(),
        Activity("redis://127.0.0.1:1"),
        AgentCalls("redis://127.0.0.1:1"),
        reports,
    )
    (row,) = worker.ready(run_id)
    thread = threading.Thread(target=run_step, args=(runtime, row.id, row.attempt))
    thread.start()
    seen: list[int] = []
    while thread.is_alive() and len(seen) < 2:
        live = shown(worker, publisher, run_id)
        if live is not None and live.tokens_out > (seen[-1] if seen else 0):
            seen.append(live.tokens_out)
    worker.runs.cancel(run_id)
    thread.join(PATIENCE)
    reports.close()
    leases.close()

    assert len(seen) == 2
    assert worker.step(run_id, "write").state in ("cancelled", "succeeded")

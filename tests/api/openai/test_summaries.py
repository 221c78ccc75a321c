"""Summaries of long conversations, with a pool whose engine is simulated."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from app.access import namespaces
from app.inference.requests import GenerateRequest
from app.kernel.database import Database
from app.kernel.settings import Settings
from app.memory.conversations.conversation import NewConversation
from app.memory.conversations.message import MessageRole, NewMessage
from app.memory.conversations.service import Conversations, parsed_conversation, shown_conversation
from app.memory.summaries import store
from app.memory.summaries.summary import StoredSummary
from app.workflows.runs import views
from app.workflows.runs.service import Runs
from tests.api.openai.conftest import StartPool
from tests.api.openai.test_chat_completions import PATIENCE, until_state
from tests.api.openai.test_conversations_continued import ask, assembly_of, said
from workers import steps
from workers.engine import Ticket
from workers.engine.simulated import SimulatedEngine
from workers.pool.direct import DirectRequests

_READY = text("SELECT step.id, step.attempt, run_id FROM step WHERE kind = 'summarize' AND state = 'ready' ORDER BY id")
_SUMMARY_RUNS = text("SELECT id FROM run WHERE workflow = 'summarize-conversation'")
FACTS = "The crate REF-48213-Q is in Porto. Write to ada@example.com about it."


class _Writer(SimulatedEngine):
    """Writes this text whenever it is asked for a summary."""

    writes = "They spoke about a crate. It is in Quito, say 977 people."

    def generate(self, request: GenerateRequest, on_text: Any = None, on_piece: Any = None) -> Ticket:
        ticket = super().generate(request, on_text, on_piece)
        if "Summarise" in request.messages[-1].content:
            ticket.texts[0] = self.writes
        return ticket


@pytest.fixture
def service(database: Database, settings: Settings) -> Conversations:
    return Conversations(database, settings.conversations)


def long_conversation(service: Conversations, turns: int = 14) -> str:
    """A conversation that nearly fills the window of 1,000 tokens; its first turn has facts."""
    messages = [NewMessage(MessageRole.USER, FACTS), NewMessage(MessageRole.ASSISTANT, "Noted.")]
    for turn in range(turns):
        messages += [
            NewMessage(MessageRole.USER, f"In turn {turn} we spoke of the weather. " + "It was fine. " * 4),
            NewMessage(MessageRole.ASSISTANT, "Yes. " * 8),
        ]
    return shown_conversation(service.create(NewConversation(namespaces.DEFAULT), messages).id)


def until_due(database: Database, count: int = 1) -> None:
    """Wait until so many summaries are due: they are submitted after the answer."""
    limit = time.monotonic() + PATIENCE
    while True:
        with database.work() as work:
            if len(work.rows(_SUMMARY_RUNS)) >= count:
                return
        assert time.monotonic() < limit
        threading.Event().wait(0.02)


def run_summaries(database: Database, pool: DirectRequests) -> list[UUID]:
    """Do the summaries that are due, as a worker of the pool does; returns their runs."""
    with database.work() as work:
        ready = work.rows(_READY)
    for row in ready:
        steps.run_step(pool.runtime, row.id, row.attempt)
    return [row.run_id for row in ready]


def latest(database: Database, conversation: str) -> StoredSummary | None:
    found = parsed_conversation(conversation)
    assert found is not None
    with database.work() as work:
        return next(iter(store.latest(work, found, 0)), None)


def engine() -> _Writer:
    return _Writer(2, 100_000, timedelta(0), context=1_000)


def test_a_fairly_full_window_is_summarised_in_the_background_with_checked_words(
    api: str, start_pool: StartPool, database: Database, service: Conversations
) -> None:
    pool = start_pool(engine=engine())
    conversation = long_conversation(service)
    first = assembly_of(database, ask(api, "And now?", conversation))
    assert first["parts"]["recent"]["first_seq"] == 1
    until_due(database)
    (run,) = run_summaries(database, pool)
    view = until_state(database, run, "succeeded", "failed")
    assert (view.run.state, view.run.priority) == ("succeeded", "batch")
    summary = latest(database, conversation)
    assert summary is not None
    assert (summary.first_seq, summary.run_id, summary.previous_id) == (1, run, None)
    assert summary.text == "They spoke about a crate. Identifiers: REF-48213-Q, ada@example.com."
    assert summary.sentences_removed == 1
    assert said(service, conversation)[summary.upto_seq].role is MessageRole.USER
    # The window is not full: the prompt begins with the same bytes as before.
    second = assembly_of(database, ask(api, "And now?", conversation))
    assert second["parts"]["recent"]["first_seq"] == 1
    assert second["parts"]["summary"]["used"] == []


def test_a_full_window_moves_to_the_end_of_the_summary_which_then_is_in_the_prompt(
    api: str, start_pool: StartPool, database: Database, service: Conversations
) -> None:
    pool = start_pool(engine=engine())
    conversation = long_conversation(service)
    ask(api, "And now?", conversation)
    until_due(database)
    run_summaries(database, pool)
    summary = latest(database, conversation)
    assert summary is not None
    reports = [assembly_of(database, ask(api, "Go on. " * 20, conversation)) for _ in range(8)]
    moved = [report["parts"]["recent"]["moved"] for report in reports]
    assert moved.count(True) == 1
    after = reports[moved.index(True)]
    assert after["parts"]["summary"]["used"][0]["seq"] == summary.upto_seq
    assert after["parts"]["recent"]["first_seq"] == summary.upto_seq + 1
    assert after["left_out"][0]["last_seq"] == summary.upto_seq
    assert after["left_out"][0]["reason"] == "before the window; the summary covers them"
    assert {report["parts"]["recent"]["first_seq"] for report in reports[moved.index(True) :]} == {summary.upto_seq + 1}


def test_the_next_summary_is_chained_and_keeps_the_identifiers(
    api: str, start_pool: StartPool, database: Database, service: Conversations
) -> None:
    pool = start_pool(engine=engine())
    conversation = long_conversation(service)
    ask(api, "And now?", conversation)
    until_due(database)
    run_summaries(database, pool)
    first = latest(database, conversation)
    assert first is not None
    for _ in range(20):
        report = assembly_of(database, ask(api, "Go on. " * 20, conversation))
        if report["parts"]["summary"]["used"] and report["parts"]["recent"]["tokens"] > 450:
            break
    until_due(database, 2)
    run_summaries(database, pool)
    second = latest(database, conversation)
    assert second is not None
    assert (second.previous_id, second.first_seq) == (first.id, first.upto_seq + 1)
    assert "REF-48213-Q" in second.text


def test_a_summary_that_fails_leaves_the_plain_window(
    api: str, start_pool: StartPool, database: Database, service: Conversations, runs: Runs
) -> None:
    pool = start_pool(engine=engine())
    conversation = long_conversation(service)
    ask(api, "And now?", conversation)
    until_due(database)
    with database.work() as work:
        (run,) = [row.id for row in work.rows(_SUMMARY_RUNS)]
    runs.cancel(run)
    reports = [assembly_of(database, ask(api, "Go on. " * 20, conversation)) for _ in range(8)]
    assert [report["parts"]["recent"]["moved"] for report in reports].count(True) == 1
    assert reports[-1]["parts"]["summary"]["used"] == []
    assert reports[-1]["left_out"][0]["reason"] == "before the window; no summary covers them yet"
    with database.work() as work:
        tries = [row.id for row in work.rows(_SUMMARY_RUNS)]
    assert 2 <= len(tries) <= 3, "one when it is fairly full, one when it is nearly full, and one of the next window"
    assert pool.pool_id
    assert views.run(database, run).run.state == "cancelled"

"""Extraction: messages are read once, whatever dies in between, and a bad conversation stops nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from app.catalog import files
from app.kernel.database import Database
from app.kernel.errors import FailureReason, StepFailure
from app.kernel.sections.memories import MemorySettings
from app.kernel.sections.memory import ConversationSettings
from app.memory.conversations.conversation import NewConversation
from app.memory.conversations.message import MessageRole, NewMessage
from app.memory.conversations.service import Conversations
from app.memory.memories import cursors, gate, prompt, service
from app.memory.memories.extraction import Extraction
from app.memory.memories.memory import NewMemory
from app.memory.memories.store import MemoryFilter
from app.workflows.runs.service import Runs
from app.workflows.runs.storage import values
from app.workflows.state_machine.outcomes import Failure, Success, TokenUsage

USER, ASSISTANT = MessageRole.USER, MessageRole.ASSISTANT
SETTINGS = MemorySettings(extract=True, model="smollm2:135m", quiet=timedelta(0))
Answer = Callable[[str], Any]


@pytest.fixture
def conversations(database: Database) -> Conversations:
    return Conversations(database, ConversationSettings())


@pytest.fixture
def extraction(runs: Runs) -> Extraction:
    catalog = files.read_catalog()
    return Extraction(runs, lambda: catalog, SETTINGS)


def said(*pairs: tuple[MessageRole, str]) -> list[NewMessage]:
    return [NewMessage(role, content) for role, content in pairs]


def proposal(given: str, messages: Sequence[int] = (1,), kind: str = "fact", replaces: int | None = None) -> Any:
    return {"messages": list(messages), "text": given, "kind": kind, "replaces": replaces, "importance": 3}


def answer(runs: Runs, with_: Answer) -> int:
    """Do the steps that wait for the model: `with_` gets the prompt, and returns the answer or raises."""
    with runs.database.work() as work:
        ready = work.rows(text("SELECT id, attempt FROM step WHERE state = 'ready' AND kind = 'generate' ORDER BY id"))
    for step in ready:
        claim = runs.claim(step.id, step.attempt, "pool")
        assert claim is not None
        with runs.database.work() as work:
            given = values.inputs(work, claim.run_id)["prompt"]
        try:
            runs.succeed(claim, "pool", Success({"memories": with_(given)}, TokenUsage(100, 20)))
        except StepFailure as error:
            runs.fail(claim, "pool", Failure(error.reason, error.message, final=True))
    return len(ready)


def texts_of(database: Database, **of: Any) -> list[str]:
    found = service.page(database, MemoryFilter(**of)).memories
    return sorted(one.text for one in found)


def refused(database: Database) -> list[tuple[str, str]]:
    with database.work() as work:
        return [
            (row.text, row.reason) for row in work.rows(text("SELECT text, reason FROM memory_refusal ORDER BY id"))
        ]


def forget_delays(database: Database) -> None:
    with database.work() as work:
        work.run(text("UPDATE memory_extraction SET retry_at = NULL"))


def state_of(database: Database, id_: UUID) -> cursors.ExtractionState:
    with database.work() as work:
        found = cursors.find(work, id_)
    assert found is not None
    return found


def test_memories_are_written_with_their_sources_and_the_run_is_removed(
    database: Database, conversations: Conversations, extraction: Extraction
) -> None:
    pair = said((USER, "I moved to Porto last spring."), (ASSISTANT, "How nice! You surely love fish."))
    made = conversations.create(NewConversation("a", user="ana"), pair)

    extraction.advance_all()
    answer(
        extraction.runs,
        lambda _: [proposal("The user moved to Porto last spring."), proposal("The user loves fish", [2])],
    )
    extraction.advance_all()

    (memory,) = service.page(database, MemoryFilter(namespace="a")).memories
    first = conversations.read(made.id)[0]
    assert (memory.text, memory.user, memory.conversation_id) == (
        "The user moved to Porto last spring.",
        "ana",
        made.id,
    )
    assert memory.valid_from == first.created_at
    assert [(one.origin.value, one.message_id) for one in memory.sources] == [("message", first.id), ("run", None)]
    assert refused(database) == [("The user loves fish", "only_assistant")]
    state = state_of(database, made.id)
    assert (state.proposed, state.written, state.tokens_in, state.tokens_out) == (2, 1, 100, 20)
    with database.work() as work:
        assert work.rows(text("SELECT id FROM run")) == [], "it holds what was said"
    assert extraction.advance_all() == 0, "nothing is read twice"


def test_without_the_option_nothing_is_read(
    database: Database, conversations: Conversations, extraction: Extraction
) -> None:
    conversations.create(NewConversation("a"), said((USER, "I moved to Porto.")))
    quiet = replace(extraction, settings=SETTINGS.model_copy(update={"extract": False}))

    assert quiet.advance_all() == 0
    with database.work() as work:
        assert work.rows(text("SELECT conversation_id FROM memory_extraction")) == []


def test_a_changed_fact_takes_the_place_of_the_one_that_the_model_named(
    database: Database, conversations: Conversations, extraction: Extraction
) -> None:
    old = service.remember(database, NewMemory("The user lives in Bern", user="ana"), "a", "ana").memory
    conversations.create(NewConversation("a", user="ana"), said((USER, "I live in Porto now, no longer in Bern.")))
    seen: list[str] = []

    def reply(given: str) -> Any:
        seen.append(given)
        return [proposal("The user lives in Porto", replaces=0)]

    extraction.advance_all()
    answer(extraction.runs, reply)
    extraction.advance_all()

    assert "0. The user lives in Bern" in seen[0]
    assert str(old.id) not in seen[0]
    assert old.id.hex not in seen[0]
    ended = service.get(database, service.shown(old.id), "a")
    (new,) = service.page(database, MemoryFilter(namespace="a")).memories
    assert (new.text, ended.superseded_by, ended.invalid_at) == ("The user lives in Porto", new.id, new.valid_from)


def test_what_was_read_is_not_read_again_and_nothing_is_left_out(
    database: Database, conversations: Conversations, extraction: Extraction
) -> None:
    """Long messages are read part by part, with an answer and new messages in between."""
    made = conversations.create(NewConversation("a"))
    words = [f"word{number}x" for number in range(700)]
    conversations.append(made.id, "a", said((USER, " ".join(words[:500])), (ASSISTANT, "Go on.")))
    seen: list[str] = []

    def reply(given: str) -> Any:
        seen.append(given.rpartition("Conversation:")[2])
        return []

    for _ in range(12):
        extraction.advance_all()
        if answer(extraction.runs, reply) and len(seen) == 1:
            conversations.append(made.id, "a", said((USER, " ".join(words[500:]))))
    extraction.advance_all()

    # A part may end within a word; without the blanks, the parts are the text.
    state = state_of(database, made.id)
    assert (state.read_through, state.read_offset, state.last_seq) == (3, 0, 3)
    everything = "".join(seen).replace(" ", "")
    assert [word for word in words if word not in everything and word[:-1] not in everything] == []
    assert 3 <= len(seen) <= 5
    assert answer(extraction.runs, reply) == 0


@pytest.mark.parametrize("dies", ["before the answer", "after the answer"])
def test_a_process_that_dies_loses_and_repeats_nothing(
    database: Database,
    conversations: Conversations,
    extraction: Extraction,
    monkeypatch: pytest.MonkeyPatch,
    dies: str,
) -> None:
    conversations.create(NewConversation("a"), said((USER, "I moved to Porto.")))
    extraction.advance_all()
    runs = extraction.runs
    if dies == "after the answer":
        answer(runs, lambda _: [proposal("The user moved to Porto.")])
        real = cursors.advance

        def die(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(cursors, "advance", die)
        with pytest.raises(KeyboardInterrupt):
            extraction.advance_all()
        assert texts_of(database, namespace="a") == [], "the memory and the cursor are one transaction"
        monkeypatch.setattr(cursors, "advance", real)

    extraction.advance_all()
    answer(runs, lambda _: [proposal("The user moved to Porto.")])
    extraction.advance_all()

    assert texts_of(database, namespace="a") == ["The user moved to Porto."]
    assert refused(database) == []


def test_two_jobs_at_once_begin_one_run(
    database: Database, conversations: Conversations, extraction: Extraction, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversations.create(NewConversation("a"), said((USER, "I moved to Porto.")))
    real = prompt.prompt_of

    def between(messages: Any, known: Any) -> str:
        monkeypatch.setattr(prompt, "prompt_of", real)
        extraction.advance_all()  # the other job is faster
        return real(messages, known)

    monkeypatch.setattr(prompt, "prompt_of", between)
    extraction.advance_all()

    with database.work() as work:
        assert len(work.rows(text("SELECT id FROM run"))) == 1


def test_a_conversation_that_raises_stops_no_other(
    database: Database, conversations: Conversations, extraction: Extraction, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = conversations.create(NewConversation("a"), said((USER, "I moved to Chur.")))
    conversations.create(NewConversation("a"), said((USER, "I moved to Porto.")))
    real = prompt.prompt_of

    def hurt(messages: Any, known: Any) -> str:
        if any("Chur" in message.content for message in messages):
            raise ZeroDivisionError("a defect")
        return real(messages, known)

    monkeypatch.setattr(prompt, "prompt_of", hurt)
    extraction.advance_all()
    answer(extraction.runs, lambda _: [proposal("The user moved to Porto.")])
    extraction.advance_all()

    assert texts_of(database, namespace="a") == ["The user moved to Porto."]
    assert (state_of(database, bad.id).error, state_of(database, bad.id).failures) == ("a defect", 1)
    monkeypatch.setattr(prompt, "prompt_of", real)
    forget_delays(database)
    extraction.advance_all()
    answer(extraction.runs, lambda _: [proposal("The user moved to Chur.")])
    extraction.advance_all()
    assert texts_of(database, namespace="a") == ["The user moved to Chur.", "The user moved to Porto."]


@pytest.mark.parametrize(("reason", "skipped"), [(FailureReason.INVALID_OUTPUT, 1), (FailureReason.ENGINE_ERROR, 0)])
def test_only_what_the_model_cannot_answer_is_skipped(
    database: Database,
    conversations: Conversations,
    extraction: Extraction,
    reason: FailureReason,
    skipped: int,
) -> None:
    made = conversations.create(NewConversation("a"), said((USER, "I moved to Porto.")))

    def fail(_: str) -> Any:
        raise StepFailure(reason, "no")

    for _ in range(3):
        extraction.advance_all()
        answer(extraction.runs, fail)
        extraction.advance_all()
        forget_delays(database)

    state = state_of(database, made.id)
    assert state.skipped == skipped
    assert "no" in state.error
    assert state.read_through == skipped


def test_a_conversation_that_is_deleted_meanwhile_leaves_no_memory(
    database: Database, conversations: Conversations, extraction: Extraction
) -> None:
    conversations.create(NewConversation("a"), said((USER, "I moved to Porto.")))
    extraction.advance_all()
    answer(extraction.runs, lambda _: [proposal("The user moved to Porto.")])
    with database.work() as work:
        work.run(text("DELETE FROM conversation"))

    extraction.advance_all()

    assert texts_of(database) == []
    with database.work() as work:
        left = {
            name: work.rows(text(f"SELECT 1 FROM {name}")) for name in ("memory_extraction", "run", "memory_refusal")
        }
    assert left == {"memory_extraction": [], "run": [], "memory_refusal": []}


def test_the_answer_s_form_is_what_is_read() -> None:
    """The example in the prompt is one, and passes the gate."""
    example = prompt.prompt_of([], []).split("Memories: ")[1].splitlines()[0]
    found = prompt.proposals(json.loads(example))
    talk = [
        gate.GateMessage(1, "user", "Hi! I left Acme and started at Globex in May."),
        gate.GateMessage(3, "user", "Thanks. I never drink coffee, tea is fine."),
    ]

    decisions = gate.decide(found, talk, [gate.KnownMemory(0, "The user works at Acme.")])
    assert [(one.reason, one.messages) for one in decisions] == [(None, (1,)), (None, (3,))]

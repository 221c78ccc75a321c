"""Extraction: messages are read once, whatever dies in between, and a bad conversation stops nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from app.json_schema import validation
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
from app.memory.recall import vectors
from app.memory.recall.query import QueryVectors
from app.memory.recall.service import Recall
from app.workflows.runs.service import Runs
from app.workflows.state_machine.outcomes import Expanded, Failure, Success, TokenUsage

USER, ASSISTANT = MessageRole.USER, MessageRole.ASSISTANT
SETTINGS = MemorySettings(extract=True, model="smollm2:135m", quiet=timedelta(0))
Answer = Callable[[str], Any]


@pytest.fixture
def conversations(database: Database) -> Conversations:
    return Conversations(database, ConversationSettings())


@pytest.fixture
def extraction(runs: Runs) -> Extraction:
    return Extraction(runs, SETTINGS, Recall(runs.database))


def said(*pairs: tuple[MessageRole, str]) -> list[NewMessage]:
    return [NewMessage(role, content) for role, content in pairs]


def proposal(given: str, kind: str = "fact", replaces: int | None = None) -> Any:
    return {"memory": given, "kind": kind, "replaces": replaces}


NOTHING = {"memory": None}


def answer(runs: Runs, with_: Answer) -> int:
    """Do the steps that wait for the model: `with_` gets what follows the examples, and answers or raises."""
    with runs.database.work() as work:
        made = work.rows(text("SELECT id, attempt FROM step WHERE state = 'ready' AND kind = 'map'"))
    for step in made:
        claim = runs.claim(step.id, step.attempt, "control")
        assert claim is not None
        runs.leave(claim, "control", Expanded(claim.data["inputs"]["pieces"]))
    done = 0
    while True:
        with runs.database.work() as work:
            ready = work.rows(text("SELECT id, attempt FROM step WHERE state = 'ready' AND kind = 'generate'"))
        if not ready:
            return done
        done += len(ready)
        for step in ready:
            claim = runs.claim(step.id, step.attempt, "pool")
            assert claim is not None
            try:
                runs.succeed(claim, "pool", Success(with_(claim.data["item"]), TokenUsage(100, 20)))
            except StepFailure as error:
                runs.fail(claim, "pool", Failure(error.reason, error.message, final=True))


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
    pair = said((USER, "I moved to Porto last spring. What is a fado?"), (ASSISTANT, "A song. You surely love fish."))
    made = conversations.create(NewConversation("a", user="ana"), pair)

    extraction.advance_all()
    given = ["The user loves fish.", "The user moved to Porto last spring."]
    answer(extraction.runs, lambda asked: proposal(given[int("Porto" in asked)]))
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
    assert refused(database) == [("The user loves fish.", "only_assistant")]
    state = state_of(database, made.id)
    assert (state.proposed, state.written, state.tokens_in, state.tokens_out) == (2, 1, 200, 40)
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
        return proposal("The user lives in Porto", replaces=0)

    extraction.advance_all()
    answer(extraction.runs, reply)
    extraction.advance_all()

    assert seen == ["Known 0: The user lives in Bern\nMessage: I live in Porto now, no longer in Bern.\nAnswer:"]
    ended = service.get(database, service.shown(old.id), "a")
    (new,) = service.page(database, MemoryFilter(namespace="a")).memories
    assert (new.text, ended.superseded_by, ended.invalid_at) == ("The user lives in Porto", new.id, new.valid_from)


class _Alike:
    """An embedding model for which all texts mean the same."""

    def __call__(self, _: str, models: Any, /) -> QueryVectors:
        return QueryVectors(dict.fromkeys(models, (1.0, 0.0)), None)

    def take_note(self, _: str, /) -> bool:
        return False

    def close(self) -> None:
        pass


def _with_vectors(database: Database) -> None:
    """Give each passage the vector that all texts have."""
    with database.work() as work:
        model = vectors.ensure_model(work, "one")
    missing = vectors.missing(database, model, 100)
    vectors.store(database, model, missing, dict.fromkeys((one.id for one in missing.passages), (1.0, 0.0)))


def test_a_memory_that_is_known_in_other_words_is_refused_with_its_id(
    database: Database, runs: Runs, conversations: Conversations
) -> None:
    known = service.remember(database, NewMemory("The user bought a home in Graz.", user="ana"), "a", "x").memory
    service.remember(database, NewMemory("The user bought a home in Graz.", user="ben"), "a", "x")
    extraction = Extraction(runs, SETTINGS, Recall(database, _Alike()))
    _with_vectors(database)
    conversations.create(NewConversation("a", "ana"), said((USER, "I purchased a house in Graz. I prefer tea.")))

    extraction.advance_all()
    answer(
        runs,
        lambda item: proposal("The user purchased a house in Graz." if "Graz" in item else "The user prefers tea."),
    )
    extraction.advance_all()

    assert texts_of(database, namespace="a", user="ana") == ["The user bought a home in Graz.", "The user prefers tea."]
    with database.work() as work:
        (row,) = work.rows(text("SELECT reason, detail FROM memory_refusal"))
    assert row.reason == "duplicate"
    assert row.detail == f"a memory says it in other words (cosine 1.00): {service.shown(known.id)}"
    (written,) = [one for one in service.page(database, MemoryFilter(user="ana")).memories if "tea" in one.text]
    (entry,) = service.history(database, service.shown(written.id), "a").entries
    assert entry.note == ""


def test_without_an_embedding_model_the_history_says_that_words_were_compared(
    database: Database, runs: Runs, extraction: Extraction, conversations: Conversations
) -> None:
    service.remember(database, NewMemory("The user bought a home in Graz.", user="ana"), "a", "x")
    conversations.create(NewConversation("a", "ana"), said((USER, "I purchased a house in Graz.")))

    extraction.advance_all()
    answer(runs, lambda _: proposal("The user purchased a house in Graz."))
    extraction.advance_all()

    assert texts_of(database, namespace="a") == [
        "The user bought a home in Graz.",
        "The user purchased a house in Graz.",
    ]
    (written,) = [one for one in service.page(database, MemoryFilter()).memories if "purchased" in one.text]
    (entry,) = service.history(database, service.shown(written.id), "a").entries
    assert entry.note == "compared by words alone: no embedding model is configured"


def test_what_was_read_is_not_read_again_and_nothing_is_left_out(
    database: Database, conversations: Conversations, extraction: Extraction
) -> None:
    """Long messages are read part by part, with new messages in between; what others than the user said is not read."""
    made = conversations.create(NewConversation("a"))
    sentences = [f"This is sentence number {number} of what I have to say." for number in range(160)]
    conversations.append(made.id, "a", said((USER, " ".join(sentences[:120])), (ASSISTANT, "Go on.")))
    seen: list[str] = []

    def reply(asked: str) -> Any:
        seen.append(asked.removeprefix("Message: ").removesuffix("\nAnswer:"))
        return NOTHING

    rounds = 0
    while extraction.advance_all():
        rounds += 1
        answer(extraction.runs, reply)
        if rounds == 1:
            conversations.append(made.id, "a", said((USER, " ".join(sentences[120:])), (ASSISTANT, "Goodbye.")))

    assert sorted(seen) == sorted(sentences)
    state = state_of(database, made.id)
    assert (state.read_through, state.read_offset, state.last_seq) == (4, 0, 4)
    assert state.runs == 3


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
        answer(runs, lambda _: proposal("The user moved to Porto."))
        real = cursors.advance

        def die(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(cursors, "advance", die)
        with pytest.raises(KeyboardInterrupt):
            extraction.advance_all()
        assert texts_of(database, namespace="a") == [], "the memory and the cursor are one transaction"
        monkeypatch.setattr(cursors, "advance", real)

    extraction.advance_all()
    answer(runs, lambda _: proposal("The user moved to Porto."))
    extraction.advance_all()

    assert texts_of(database, namespace="a") == ["The user moved to Porto."]
    assert refused(database) == []


def test_two_jobs_at_once_begin_one_run(
    database: Database, conversations: Conversations, extraction: Extraction, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversations.create(NewConversation("a"), said((USER, "I moved to Porto.")))
    real = prompt.prompt_of

    def between(piece: Any, known: Any) -> str:
        monkeypatch.setattr(prompt, "prompt_of", real)
        extraction.advance_all()  # the other job is faster
        return real(piece, known)

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

    def hurt(piece: Any, known: Any) -> str:
        if "Chur" in piece.text:
            raise ZeroDivisionError("a defect")
        return real(piece, known)

    monkeypatch.setattr(prompt, "prompt_of", hurt)
    extraction.advance_all()
    answer(extraction.runs, lambda _: proposal("The user moved to Porto."))
    extraction.advance_all()

    assert texts_of(database, namespace="a") == ["The user moved to Porto."]
    assert (state_of(database, bad.id).error, state_of(database, bad.id).failures) == ("a defect", 1)
    monkeypatch.setattr(prompt, "prompt_of", real)
    forget_delays(database)
    extraction.advance_all()
    answer(extraction.runs, lambda _: proposal("The user moved to Chur."))
    extraction.advance_all()
    assert texts_of(database, namespace="a") == ["The user moved to Chur.", "The user moved to Porto."]


@pytest.mark.parametrize("reason", [FailureReason.INVALID_OUTPUT, FailureReason.ENGINE_ERROR])
def test_only_what_the_model_cannot_answer_is_skipped(
    database: Database, conversations: Conversations, extraction: Extraction, reason: FailureReason
) -> None:
    made = conversations.create(NewConversation("a"), said((USER, "I moved to Porto. I bought a tuba.")))

    def fail(asked: str) -> Any:
        if "tuba" in asked:
            raise StepFailure(reason, "no")
        return proposal("The user moved to Porto.")

    extraction.advance_all()
    answer(extraction.runs, fail)
    extraction.advance_all()

    state = state_of(database, made.id)
    if reason is FailureReason.INVALID_OUTPUT:
        assert (state.skipped, state.read_through, state.failures, state.written) == (1, 1, 0, 1)
    else:
        assert (state.skipped, state.read_through, state.failures, state.written) == (0, 0, 1, 0)
        assert state.error == "1 requests failed: engine_error"
        assert extraction.advance_all() == 0, "not before the delay is over"
        forget_delays(database)
        extraction.advance_all()
        answer(extraction.runs, lambda asked: proposal("The user bought a tuba.") if "tuba" in asked else NOTHING)
        extraction.advance_all()
        assert texts_of(database) == ["The user bought a tuba."]


def test_a_conversation_that_is_deleted_meanwhile_leaves_no_memory(
    database: Database, conversations: Conversations, extraction: Extraction
) -> None:
    conversations.create(NewConversation("a"), said((USER, "I moved to Porto.")))
    extraction.advance_all()
    answer(extraction.runs, lambda _: proposal("The user moved to Porto."))
    with database.work() as work:
        work.run(text("DELETE FROM conversation"))

    extraction.advance_all()

    assert texts_of(database) == []
    with database.work() as work:
        left = {
            name: work.rows(text(f"SELECT 1 FROM {name}")) for name in ("memory_extraction", "run", "memory_refusal")
        }
    assert left == {"memory_extraction": [], "run": [], "memory_refusal": []}


def test_the_examples_have_the_form_of_answers_and_pass_the_gate() -> None:
    parts = prompt.examples().split("Message: ")[1:]
    messages = [gate.GateMessage(n, "user", part.partition("\n")[0]) for n, part in enumerate(parts, start=1)]
    messages.append(gate.GateMessage(99, "assistant", "Which sport do you like?"))
    answers = [json.loads(part.partition("Answer: ")[2].partition("\n")[0]) for part in parts]

    assert all(validation.conforms(prompt.ANSWER, answer) for answer in answers)
    known = [gate.KnownMemory(1, "The user drives a Volvo.")]
    decisions = gate.decide(prompt.proposals(answers, range(1, len(answers) + 1)), messages, known)
    assert [(one.reason, one.detail) for one in decisions] == [(None, "")] * 7
    assert [one.replaces for one in decisions if one.replaces is not None] == [1]


def test_a_short_answer_is_read_with_its_question() -> None:
    talk = [
        gate.GateMessage(1, "assistant", "Welcome. Which city do you live in?"),
        gate.GateMessage(2, "user", "Porto, since May."),
        gate.GateMessage(3, "assistant", "Nice!"),
        gate.GateMessage(4, "user", "It is. I work in a harbour."),
    ]
    pieces = prompt.pieces_of(talk, [2, 4])
    assert [(one.message, one.text, one.asked) for one in pieces] == [
        (2, "Porto, since May.", "Welcome. Which city do you live in?"),
        (4, "It is.", ""),
        (4, "I work in a harbour.", ""),
    ]
    (found,) = gate.decide([gate.ProposedMemory("The user lives in Porto since May.")], talk, [])
    assert (found.reason, found.messages) == (None, (2,))

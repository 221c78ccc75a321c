"""Consolidation: turns are read once, patterns have sources, and a death in between repeats no cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from app.kernel.database import Database
from app.kernel.errors import NotFound, Unavailable
from app.kernel.sections.consolidation import ConsolidationSettings
from app.kernel.sections.memory import ConversationSettings
from app.memory.consolidation import service
from app.memory.consolidation.advance import Consolidations
from app.memory.consolidation.consolidation import Consolidation, shown_consolidation
from app.memory.conversations.conversation import NewConversation, StoredConversation
from app.memory.conversations.message import MessageRole, NewMessage
from app.memory.conversations.service import Conversations
from app.memory.memories import service as memories
from app.memory.memories.kinds import MemoryKind
from app.memory.memories.memory import Memory, NewMemory
from app.memory.memories.store import MemoryFilter
from app.memory.recall import vectors
from app.workflows.language.steps import EmbedFields, MapStep
from app.workflows.runs.recovery import owners, sweep
from app.workflows.runs.service import Runs
from app.workflows.state_machine.outcomes import Expanded, Success, TokenUsage

MODEL = "all-minilm:l6-v2"
SETTINGS = ConsolidationSettings(model="smollm2:135m", min_turns=3)
BACKUPS = ["the backup failed again", "the nightly backup failed", "backup failed, again this night", "failed backup"]
COFFEE = ["order coffee beans", "we need coffee beans", "coffee beans are out, order some"]
FAILS, BEANS = "The backup fails at night.", "The user orders coffee beans."


def vector_of(said: str) -> list[float]:
    """A vector for each subject: texts about the same are near each other."""
    for place, word in enumerate(("backup", "coffee", "train")):
        if word in said:
            return [float(place == at) for at in range(4)]
    return [0.0, 0.0, 0.0, 1.0]


def cluster(groups: Sequence[Sequence[str]], smallest: int, _: timedelta) -> list[list[list[int]]]:
    """Equal vectors are a cluster."""
    found = []
    for group in groups:
        of: dict[str, list[int]] = {}
        for index, vector in enumerate(group):
            of.setdefault(vector, []).append(index)
        found.append([one for key, one in of.items() if len(one) >= smallest and not key.startswith("[0,0,0,1")])
    return found


@pytest.fixture
def conversations(database: Database) -> Conversations:
    return Conversations(database, ConversationSettings())


@pytest.fixture
def consolidations(runs: Runs) -> Consolidations:
    return Consolidations(runs, SETTINGS, MODEL, cluster)


def say(conversations: Conversations, said: Sequence[str], user: str = "ana") -> StoredConversation:
    return conversations.create(NewConversation("a", user=user), [NewMessage(MessageRole.USER, one) for one in said])


def embed(database: Database) -> None:
    """Make the vectors that are missing."""
    with database.work() as work:
        model = vectors.ensure_model(work, MODEL)
    batch = vectors.missing(database, model, 1_000)
    if batch.passages:
        vectors.store(database, model, batch, {one.id: vector_of(one.text) for one in batch.passages})


def begin(consolidations: Consolidations) -> UUID:
    database = consolidations.runs.database
    return service.begin(database, consolidations.settings, "a", "test").consolidation.id


def state_of(database: Database, id_: UUID) -> Consolidation:
    return service.get(database, shown_consolidation(id_), "a")[0]


def patterns_of(database: Database) -> list[Memory]:
    return service_page(database, kind=MemoryKind.PATTERN)


def service_page(database: Database, **of: Any) -> list[Memory]:
    found = memories.page(database, MemoryFilter(namespace="a", **of)).memories
    return [memories.get(database, memories.shown(one.id), "a") for one in found]


def ready(runs: Runs) -> Iterator[tuple[UUID, int]]:
    """The steps that wait for a worker, until there are none."""
    while True:
        with runs.database.work() as work:
            found = work.rows(text("SELECT id, attempt FROM step WHERE state = 'ready' ORDER BY key, item"))
        if not found:
            return
        yield from ((one.id, one.attempt) for one in found)


def answers(prompt: str) -> Any:
    """What a good model says of a prompt."""
    return {"pattern": FAILS if "backup" in prompt else BEANS if "coffee" in prompt else None}


def work_off(
    runs: Runs, asked: Callable[[str], Any] = answers, owner: str = "pool@here/1/a", most: int = 1_000
) -> list[str]:
    """Do the steps of the run; returns the prompts that were answered. At most `most` of them."""
    prompts: list[str] = []
    for id_, attempt in ready(runs):
        claim = runs.claim(id_, attempt, owner)
        if claim is None:
            continue
        work = claim.work
        if isinstance(work, MapStep):
            key = work.over.removeprefix("inputs.")
            runs.leave(claim, owner, Expanded(claim.data["inputs"][key]))
        elif isinstance(work, EmbedFields):
            outputs = claim.data["steps"]
            said = [one and one["pattern"] for key in ("patterns", "reviews") for one in outputs[key]["output"]]
            runs.succeed(claim, owner, Success([vector_of((one or "").lower()) for one in said], TokenUsage(9, 0)))
        elif len(prompts) == most:
            return prompts  # it holds this one, and dies
        else:
            prompts.append(claim.data["item"])
            runs.succeed(claim, owner, Success(asked(claim.data["item"]), TokenUsage(100, 20)))
    return prompts


def done(consolidations: Consolidations, asked: Callable[[str], Any] = answers) -> Consolidation:
    """Do a consolidation from the beginning to the end."""
    id_ = begin(consolidations)
    embed(consolidations.runs.database)
    consolidations.advance_all()
    work_off(consolidations.runs, asked)
    consolidations.advance_all()
    return state_of(consolidations.runs.database, id_)


def test_patterns_are_written_with_their_sources_and_the_run_is_removed(
    database: Database, conversations: Conversations, consolidations: Consolidations
) -> None:
    first = say(conversations, [*BACKUPS[:2], "hello"])
    second = say(conversations, [*BACKUPS[2:], *COFFEE[:2], "what is a fado?"])
    id_ = begin(consolidations)

    consolidations.advance_all()
    assert state_of(database, id_).waits_for.startswith("8 vectors")
    embed(database)
    consolidations.advance_all()
    assert (state_of(database, id_).state, state_of(database, id_).turns, state_of(database, id_).clusters) == (
        "running",
        8,
        1,
    )
    work_off(consolidations.runs)
    consolidations.advance_all()

    (pattern,) = patterns_of(database)
    assert (pattern.text, pattern.user) == (FAILS, "ana")
    said = {one.message_id for one in pattern.sources if one.message_id}
    expected = [*conversations.read(first.id)[:2], *conversations.read(second.id)[:2]]
    assert said == {one.id for one in expected}
    ended = state_of(database, id_)
    assert (ended.state, ended.written, ended.tokens_in, ended.tokens_out) == ("succeeded", 1, 209, 40)
    assert ended.outcomes[0]["memory"] == memories.shown(pattern.id)
    with database.work() as work:
        assert work.rows(text("SELECT id FROM run")) == [], "it has what was said"
    assert done(consolidations).turns == 4, "what was in no cluster is read again, the cluster is not"


def test_a_dead_worker_repeats_no_cluster(
    database: Database, conversations: Conversations, consolidations: Consolidations
) -> None:
    say(conversations, [*BACKUPS, *COFFEE, "the train is late", "train late", "late train"])
    begin(consolidations)
    embed(database)
    consolidations.advance_all()
    runs = consolidations.runs

    before = work_off(runs, owner="pool@here/1/a", most=2)
    with database.work() as work:
        held = work.rows(text("SELECT id FROM step WHERE state = 'running' AND kind = 'generate'"))
    assert (len(before), len(held)) == (2, 1), "it died with one request in its hands"
    assert owners.expire_leases(database, "a") == 1
    assert sweep.sweep(runs, republish_after=timedelta(minutes=5)).lost == 1
    consolidations.advance_all()
    after = work_off(runs, owner="pool@here/2/b")
    consolidations.advance_all()

    assert max(Counter([*before, *after]).values()) == 1, "no request that was answered is made again"
    assert len(before) + len(after) == 6, "two passes of three clusters"
    assert sorted(one.text for one in patterns_of(database)) == [FAILS, BEANS]


def test_what_is_found_again_is_merged(
    database: Database, conversations: Conversations, consolidations: Consolidations
) -> None:
    say(conversations, BACKUPS)
    assert done(consolidations).written == 1
    (old,) = patterns_of(database)
    say(conversations, [f"{one}, today too" for one in BACKUPS])

    found = done(consolidations)

    assert (found.turns, found.written, found.merged) == (4, 0, 1), "only new turns are read"
    (pattern,) = patterns_of(database)
    assert pattern.id == old.id
    assert pattern.confidence > old.confidence
    assert len([one for one in pattern.sources if one.message_id]) == 8
    events = [one.event for one in memories.history(database, memories.shown(pattern.id), "a").entries]
    assert events == ["remembered", "reinforced"]


def test_what_somebody_has_ended_is_not_written_again(
    database: Database, conversations: Conversations, consolidations: Consolidations
) -> None:
    say(conversations, BACKUPS)
    done(consolidations)
    memories.invalidate(database, memories.shown(patterns_of(database)[0].id), "a", "ana")
    say(conversations, BACKUPS)

    found = done(consolidations)

    assert (found.refused, found.outcomes[0]["reason"]) == (1, "ended")
    assert patterns_of(database) == []


def test_passes_that_disagree_and_inventions_are_refused(
    database: Database, conversations: Conversations, consolidations: Consolidations
) -> None:
    say(conversations, [*BACKUPS, *COFFEE])

    def asked(prompt: str) -> Any:
        if "coffee" in prompt:
            return {"pattern": "The user moved to Lisbon for the coffee."}
        return {"pattern": FAILS if prompt.startswith("Message") else "The train is late."}

    found = done(consolidations, asked)

    assert [one["reason"] for one in found.outcomes] == ["low_confidence", "not_grounded"]
    assert patterns_of(database) == []


def test_what_one_user_says_is_no_pattern_of_another(
    database: Database, conversations: Conversations, consolidations: Consolidations
) -> None:
    say(conversations, BACKUPS[:2], "ana")
    say(conversations, BACKUPS[2:], "ben")
    say(conversations, COFFEE, "ben")

    done(consolidations)

    assert [(one.user, one.text) for one in patterns_of(database)] == [("ben", BEANS)]


def test_events_that_were_remembered_are_read_and_extracted_memories_are_not(
    database: Database, conversations: Conversations, consolidations: Consolidations
) -> None:
    for said in BACKUPS:
        memories.remember(database, NewMemory(said, user="ana"), "a", "monitor")
    made = say(conversations, ["hello"])
    message = conversations.read(made.id)[0]
    sources = memories.message_sources(database, [f"msg_{message.id.hex}"], "a")
    memories.remember(database, NewMemory("the backup is extracted", user="ana", sources=sources), "a", "x")

    found = done(consolidations)

    assert (found.turns, found.written) == (5, 1)


def test_a_deleted_conversation_begins_it_again_with_what_is_left(
    database: Database, conversations: Conversations, consolidations: Consolidations
) -> None:
    say(conversations, BACKUPS)
    id_ = begin(consolidations)
    embed(database)
    consolidations.advance_all()
    run_id = state_of(database, id_).run_id
    with database.work() as work:
        linked = work.rows(text("SELECT run_id FROM conversation_run"))
        assert [one.run_id for one in linked] == [run_id], "who deletes the conversation deletes the run"
        work.run(text("DELETE FROM run"))

    consolidations.advance_all()
    consolidations.advance_all()

    assert (state_of(database, id_).state, state_of(database, id_).restarts) == ("running", 1)
    work_off(consolidations.runs)
    consolidations.advance_all()
    assert state_of(database, id_).written == 1


def test_a_namespace_has_one_at_a_time_and_cancelled_turns_are_read_by_the_next_one(
    database: Database, conversations: Conversations, consolidations: Consolidations
) -> None:
    say(conversations, BACKUPS)
    id_ = begin(consolidations)
    again = service.begin(database, SETTINGS, "a", "test")
    assert (again.consolidation.id, again.created) == (id_, False)
    embed(database)
    consolidations.advance_all()

    cancelled = service.cancel(consolidations.runs, shown_consolidation(id_), "a")

    assert cancelled.state == "cancelled"
    with database.work() as work:
        (run,) = work.rows(text("SELECT state FROM run"))
    assert run.state in ("cancelled", "cancelling")
    assert done(consolidations).written == 1
    with pytest.raises(NotFound):
        service.get(database, shown_consolidation(id_), "b")


def test_a_schedule_begins_what_is_due_once(
    database: Database, conversations: Conversations, consolidations: Consolidations
) -> None:
    say(conversations, BACKUPS)
    service.set_policy(database, "a", every=timedelta(hours=1), model="gemma3:270m", review_model=None)
    assert consolidations.advance_all() == 0, "the first one is after an interval"
    with database.work() as work:
        work.run(text("UPDATE consolidation_namespace SET next_at = now() - interval '10 hours'"))

    assert consolidations.advance_all() == 1
    (one,) = service.page(database, "a")[0]
    assert (one[0].requested_by, one[0].model, one[0].review_model) == ("schedule", "gemma3:270m", "gemma3:270m")
    with database.work() as work:
        (row,) = work.rows(text("SELECT next_at > now() AS later FROM consolidation_namespace"))
    assert row.later, "those that were missed are left out"


def test_it_is_bounded_and_the_rest_is_for_the_next_one(
    database: Database, conversations: Conversations, consolidations: Consolidations
) -> None:
    say(conversations, [*(f"{one} {number}" for number in range(4) for one in BACKUPS)])
    small = replace(consolidations, settings=SETTINGS.model_copy(update={"max_turns": 10}))

    first, second = done(small), done(small)

    assert (first.turns, first.has_more) == (10, True)
    assert (second.turns, second.has_more, second.merged) == (6, False, 1)


def test_what_fails_says_why_and_reads_nothing(
    database: Database, conversations: Conversations, consolidations: Consolidations
) -> None:
    say(conversations, BACKUPS)

    def broken(*_: Any) -> Any:
        raise ValueError("no clusters today")

    def missing(*_: Any) -> Any:
        raise Unavailable("scikit-learn is not installed")

    waiting = begin(consolidations)
    embed(database)
    replace(consolidations, cluster=missing).advance_all()
    assert "not installed" in state_of(database, waiting).waits_for
    replace(consolidations, cluster=broken).advance_all()
    assert (state_of(database, waiting).state, state_of(database, waiting).error) == ("failed", "no clusters today")
    assert done(consolidations).written == 1, "the turns are read by the next one"

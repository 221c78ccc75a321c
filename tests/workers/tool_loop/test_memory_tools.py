"""The tools of agents on conversations, memories and blocks; and the conversation of an agent."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from app.inference.requests import ChatMessage
from app.kernel.database import Database
from app.kernel.errors import DatabaseUnreachable, StepFailure
from app.kernel.settings import Settings
from app.memory.blocks import storage as block_storage
from app.memory.blocks.block import BlockAuthor, BlockAuthorKind, BlockTarget, BlockTargetKind, NewBlock
from app.memory.conversations.conversation import NewConversation
from app.memory.conversations.message import MessageRole, NewMessage
from app.memory.conversations.service import Conversations, shown_conversation
from app.memory.memories import service as memories
from app.memory.memories.kinds import MemoryKind
from app.memory.memories.memory import NewMemory
from app.memory.recall import storage as recall
from app.memory.recall.passages import NewPassage, SourceKind
from app.memory.recall.service import Recall
from app.workflows.runs.service import Runs
from app.workflows.state_machine.outcomes import Success
from tests.workflows.conftest import StepWorker
from workers.tool_loop import conversation, memory_tools
from workers.tool_loop.memory_tools import MemoryAccess

SETTINGS = Settings()
RUN = UUID(int=1)


@pytest.fixture
def talk(database: Database) -> str:
    service = Conversations(database, SETTINGS.conversations)
    said = [("user", "My boat is called Ursula."), ("assistant", "A fine name."), ("user", "It lies in Triest.")]
    messages = [NewMessage(MessageRole(role), content) for role, content in said]
    return shown_conversation(service.create(NewConversation("default", user="ana"), messages).id)


@pytest.fixture
def access(database: Database, talk: str) -> MemoryAccess:
    found = Recall(database)
    return MemoryAccess(
        *(database, found, "default", "ana", talk, SETTINGS.conversations, SETTINGS.blocks),
        *("helper", "m", str(RUN), "agent[1]"),
    )


def remember(database: Database, text: str, kind: MemoryKind, **more: Any) -> str:
    made = memories.remember(database, NewMemory(text, kind, user="ana", **more), "default", "test").memory
    shown = memories.shown(made.id)
    passage = NewPassage("default", SourceKind.MEMORY, shown, text, user="ana", kind=kind.value, at=made.created_at)
    with database.work() as work:
        recall.put_in(work, [passage])
    return shown


def result(access: MemoryAccess, name: str, **arguments: Any) -> Any:
    return json.loads(memory_tools.call(access, name, arguments))


def test_history_is_looked_up_by_time_and_role(access: MemoryAccess) -> None:
    assert [one["text"] for one in result(access, "lookup_history", limit=2)] == ["A fine name.", "It lies in Triest."]
    assert [one["text"] for one in result(access, "lookup_history", roles=["assistant"])] == ["A fine name."]
    assert result(access, "lookup_history", end="2020-01-01") == []
    with pytest.raises(StepFailure, match="is not an instant"):
        result(access, "lookup_history", start="yesterday")
    with pytest.raises(StepFailure, match="no conversation"):
        result(replace(access, conversation=None), "lookup_history")
    with pytest.raises(StepFailure, match="conv_"):
        result(replace(access, namespace="other"), "lookup_history")


def test_a_run_with_texts_of_a_conversation_is_noted_as_one_of_its_runs(
    access: MemoryAccess, database: Database, talk: str
) -> None:
    def linked() -> list[tuple[str, UUID]]:
        with database.work() as work:
            rows = work.rows(text("SELECT conversation_id, run_id FROM conversation_run ORDER BY run_id"))
            return [(shown_conversation(row.conversation_id), row.run_id) for row in rows]

    service = Conversations(database, SETTINGS.conversations)
    other = service.create(NewConversation("default", user="ana"), [NewMessage(MessageRole.USER, "My car is old.")])
    result(replace(access, conversation=None), "lookup_history", query="the boat Ursula")
    assert linked() == [(talk, RUN)], "and not of those in which nothing was found"

    later = UUID(int=2)
    shown = shown_conversation(other.id)
    conversation.before(database, SETTINGS.conversations, shown, "default", later)
    assert linked() == [(talk, RUN), (shown, later)]


def test_memories_are_found_while_they_hold(access: MemoryAccess, database: Database) -> None:
    fact = remember(database, "The boat Ursula has two sails.", MemoryKind.FACT)
    insight = remember(database, "The boat leaks at the keel: that explains the water.", MemoryKind.BREAKTHROUGH)

    found = result(access, "query_memory", query="sails of the boat")
    assert found[0]["id"] == fact
    assert found[0]["score"] > 0
    assert [one["id"] for one in result(access, "query_memory", query="boat", kinds=["breakthrough"])] == [insight]
    assert [one["id"] for one in result(access, "recall_breakthroughs")] == [insight]
    assert [one["id"] for one in result(access, "recall_breakthroughs", topic="water in the boat")] == [insight]
    memories.invalidate(database, fact, "default", "test")
    assert fact not in {one["id"] for one in result(access, "query_memory", query="sails of the boat")}
    assert result(replace(access, user="eva"), "query_memory", query="boat") == []


def test_a_context_keeps_its_budget(access: MemoryAccess, database: Database) -> None:
    insight = remember(database, "The boat leaks at the keel.", MemoryKind.BREAKTHROUGH)
    found = result(access, "get_enriched_context", query="Where is the boat?", token_budget=400)

    assert [one["text"] for one in found["recent"]][-1] == "It lies in Triest."
    assert [one["id"] for one in found["breakthroughs"]] == [insight]
    assert 0 < found["tokens"] <= 400
    small = result(access, "get_enriched_context", query="Where is the boat?", token_budget=50)
    assert small["tokens"] <= 50
    assert small["left_out"] > 0


def test_an_edit_of_a_block_is_made_once(access: MemoryAccess) -> None:
    new = {"label": "boat", "description": "About the boat", "value": "Ursula"}
    assert "was created" in memory_tools.call(access, "memory_create", new)
    edit = {"label": "boat", "new_string": "in Triest"}
    second = replace(access, key="agent[2]")
    assert "was edited" in memory_tools.call(second, "memory_insert", edit)
    assert memory_tools.call(second, "memory_insert", edit) == "This was done before."
    with pytest.raises(StepFailure, match="no memory block"):
        memory_tools.call(replace(access, key="agent[3]"), "memory_insert", {**edit, "label": "house"})


def test_all_tools_are_described() -> None:
    names = [*memory_tools._DESCRIBED, *memory_tools.block_tools.SCHEMAS]
    described = memory_tools.describe(names)
    assert [one.name for one in described] == names
    assert all(one.description for one in described)


FLOW = """
workflow: asking
inputs: {id: {type: string}}
steps:
  - id: agent
    kind: agent
    model: smollm2:135m
    system: Be brief.
    prompt: Where is it?
    conversation: "{{ inputs.id }}"
    user: ana
    tools: [{memory: [lookup_history, memory_create]}]
"""


def test_an_agent_reads_its_conversation_and_appends_to_it_once(runs: Runs, database: Database, talk: str) -> None:
    worker = StepWorker(runs)
    run_id = worker.submit(FLOW, id=talk)
    calls = [{"name": "lookup_history", "arguments": {}}]
    first = Success({"text": "", "tool_calls": calls, "finish_reason": "tool_calls"})
    last = Success({"text": "In Triest.", "tool_calls": [], "finish_reason": "stop"})
    worker.work(**{"agent[0]": first, "agent[2]": last})

    assert worker.run(run_id).state == "succeeded", worker.run(run_id).error
    items = worker.items(run_id, "agent")
    said = [message["content"] for message in items[0].input["opening"]["messages"]]
    assert said == ["Be brief.", "My boat is called Ursula.", "A fine name.", "It lies in Triest.", "Where is it?"]
    assert "Triest" in items[1].output
    service = Conversations(database, SETTINGS.conversations)
    stored = service.read(service.get(None if not talk else memory_tools.parsed_conversation(talk), "default").id)
    assert [(one.role.value, one.content) for one in stored[3:]] == [
        ("user", "Where is it?"),
        ("assistant", "In Triest."),
    ]
    assert {(one.run_id, one.step_key) for one in stored[3:]} == {(run_id, "agent")}


def test_an_agent_sees_the_blocks_of_its_workflow_and_edits_them(runs: Runs, database: Database, talk: str) -> None:
    author = BlockAuthor(BlockAuthorKind.CALLER, "test")
    with database.work() as work:
        for label, target in (("boat", "asking"), ("house", "another")):
            to = [BlockTarget(BlockTargetKind.AGENT, target)]
            block_storage.create_in(work, "default", NewBlock(label, "red"), author, SETTINGS.blocks, targets=to)
    worker = StepWorker(runs)
    run_id = worker.submit(FLOW.replace("lookup_history", "memory_insert"), id=talk)
    edit = {"name": "memory_insert", "arguments": {"label": "boat", "new_string": "and white"}}
    first = Success({"text": "", "tool_calls": [edit], "finish_reason": "tool_calls"})
    last = Success({"text": "Done.", "tool_calls": [], "finish_reason": "stop"})
    worker.work(**{"agent[0]": first, "agent[2]": last})

    items = worker.items(run_id, "agent")
    system = items[0].input["opening"]["messages"][0]
    assert system["role"] == "system"
    assert system["content"].startswith("Be brief.\n\n<memory_blocks>")
    assert 'label="boat"' in system["content"]
    assert 'label="house"' not in system["content"]
    assert "was edited" in items[1].output


def test_an_agent_does_not_take_an_outage_of_the_database_for_a_wrong_conversation(talk: str) -> None:
    away = Database("postgresql://postgres@127.0.0.1:1/none?connect_timeout=2")
    with pytest.raises(DatabaseUnreachable):
        conversation.before(away, SETTINGS.conversations, talk, "default", RUN)
    said = [ChatMessage("user", "Where?")]
    with pytest.raises(DatabaseUnreachable):
        conversation.append(away, SETTINGS.conversations, talk, "default", said, model=None, run_id=RUN, key="agent")

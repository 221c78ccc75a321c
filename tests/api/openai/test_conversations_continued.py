"""Calls that continue a stored conversation, with a pool whose engine is simulated."""

from __future__ import annotations

import threading
import time
from typing import Any
from uuid import UUID

import httpx2
import openai
import pytest
from sqlalchemy import text

from app.access import namespaces
from app.kernel.database import Database
from app.kernel.settings import Settings
from app.memory.conversations.conversation import NewConversation
from app.memory.conversations.message import MessageRole, NewMessage, StoredMessage
from app.memory.conversations.service import Conversations, parsed_conversation, shown_conversation
from app.memory.memories import service as memories
from app.memory.memories.kinds import MemoryKind
from app.memory.memories.memory import NewMemory
from app.workflows.language import definition as definitions
from app.workflows.runs import views
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission
from tests.api.openai.conftest import MODEL, StartPool
from tests.api.openai.test_chat_completions import PATIENCE, body, run_of, until_state
from tests.workflows.conftest import StepWorker
from workers import steps

_ATTEMPTS = text("SELECT assembly, tokens_in FROM attempt WHERE step_id = :step")
_DELETE = text("DELETE FROM conversation WHERE id = :id")


@pytest.fixture
def service(database: Database, settings: Settings) -> Conversations:
    return Conversations(database, settings.conversations)


@pytest.fixture
def conversation(service: Conversations) -> str:
    return shown_conversation(service.create(NewConversation(namespaces.DEFAULT)).id)


def ask(api: str, text: str, conversation: str, **more: Any) -> httpx2.Response:
    given = body(messages=[{"role": "user", "content": text}], conversation_id=conversation, **more)
    return httpx2.post(f"{api}/v1/chat/completions", json=given, timeout=PATIENCE)


def said(service: Conversations, conversation: str) -> list[StoredMessage]:
    found = parsed_conversation(conversation)
    assert found is not None
    return service.read(found, limit=1_000)


def assembly_of(database: Database, answer: httpx2.Response) -> Any:
    view = until_state(database, run_of(answer), "succeeded")
    return view.attempts[view.steps[0].id][0].assembly


def test_the_next_call_has_the_turn_before_in_its_prompt(
    api: str, start_pool: StartPool, database: Database, service: Conversations, conversation: str
) -> None:
    start_pool()
    first = ask(api, "My ship is called Mira.", conversation)
    assert first.status_code == 200, first.text
    second = ask(api, "What is my ship called?", conversation)
    assert [(one.seq, one.role.value) for one in said(service, conversation)] == [
        (1, "user"),
        (2, "assistant"),
        (3, "user"),
        (4, "assistant"),
    ]
    assert said(service, conversation)[1].content == first.json()["choices"][0]["message"]["content"]
    report = assembly_of(database, second)
    assert report["conversation"] == conversation
    assert report["parts"]["recent"]["messages"] == 2
    assert report["left_out"] == []
    assert second.json()["usage"]["prompt_tokens"] == report["context"]["prompt"]


def test_a_streamed_answer_is_appended_before_its_stream_ends(
    api: str, start_pool: StartPool, service: Conversations, conversation: str
) -> None:
    start_pool()
    with openai.OpenAI(base_url=f"{api}/v1", api_key="none") as client:
        for turn in range(3):
            given = body(messages=[{"role": "user", "content": f"Turn {turn}."}])
            stream = client.chat.completions.create(**given, stream=True, extra_body={"conversation_id": conversation})
            for _ in stream:
                pass
            assert len(said(service, conversation)) == 2 * (turn + 1)


def test_a_call_that_fails_leaves_nothing_in_its_conversation(
    api: str, start_pool: StartPool, service: Conversations, conversation: str
) -> None:
    start_pool()
    answer = ask(api, "word " * 20_000, conversation)
    assert answer.status_code == 400
    assert "context" in answer.text
    assert said(service, conversation) == []


def test_a_wrong_conversation_is_refused_before_a_run(api: str, start_pool: StartPool, service: Conversations) -> None:
    start_pool()
    foreign = shown_conversation(service.create(NewConversation("other")).id)
    unknown = f"conv_{UUID(int=7).hex}"
    answers = [ask(api, "Hello.", name) for name in (foreign, unknown, "nonsense")]
    assert [answer.status_code for answer in answers] == [404] * 3
    assert answers[0].json()["error"]["message"].replace(foreign, "") == answers[1].json()["error"]["message"].replace(
        unknown, ""
    )
    assert {answer.json()["error"]["param"] for answer in answers} == {"conversation_id"}


def test_an_error_names_the_field_of_an_unknown_conversation(api: str) -> None:
    of_path = "/v1/conversations/conv_x"
    cases: list[tuple[str, str, dict[str, Any] | None, str]] = [
        ("POST", "/v1/responses", {"model": MODEL, "input": "Hello.", "conversation": "conv_x"}, "conversation"),
        ("GET", of_path, None, "conversation_id"),
        ("POST", of_path, {"title": "Tea"}, "conversation_id"),
        ("DELETE", of_path, None, "conversation_id"),
        ("GET", f"{of_path}/items", None, "conversation_id"),
        ("POST", f"{of_path}/fork", {}, "conversation_id"),
        ("GET", f"{of_path}/search?q=tea", None, "conversation_id"),
        ("GET", "/v1/conversations?after=conv_x", None, "after"),
    ]
    for method, path, given, param in cases:
        answer = httpx2.request(method, f"{api}{path}", json=given, timeout=PATIENCE)
        assert answer.status_code == 404, answer.text
        assert answer.json()["error"]["param"] == param, (method, path)


def test_a_response_whose_conversation_is_gone_names_its_field(
    api: str, start_pool: StartPool, service: Conversations, database: Database, conversation: str
) -> None:
    start_pool()
    client = openai.OpenAI(base_url=f"{api}/v1", api_key="none", max_retries=0, timeout=PATIENCE)
    first = client.responses.create(model=MODEL, input="Hello.", conversation=conversation)
    with database.work() as work:
        work.execute(_DELETE, {"id": parsed_conversation(conversation)})
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(model=MODEL, input="And now?", previous_response_id=first.id)
    assert caught.value.param == "previous_response_id"


def test_two_callers_at_once_keep_their_turns_whole(
    api: str, start_pool: StartPool, service: Conversations, conversation: str
) -> None:
    start_pool(slots=4)
    answers: list[httpx2.Response] = []
    threads = [
        threading.Thread(target=lambda name=name: answers.append(ask(api, f"I am {name}.", conversation)))
        for name in ("Ada", "Bo", "Cy", "Di")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 4
    found = said(service, conversation)
    assert [one.role.value for one in found] == ["user", "assistant"] * 4
    assert all(one.run_id == two.run_id for one, two in zip(found[::2], found[1::2], strict=True))


def test_the_run_says_what_was_left_out_and_why(
    api: str, start_pool: StartPool, database: Database, service: Conversations
) -> None:
    start_pool()
    old = [
        NewMessage(MessageRole.USER if n % 2 == 0 else MessageRole.ASSISTANT, f"{n} " + "x" * 400) for n in range(200)
    ]
    conversation = shown_conversation(service.create(NewConversation(namespaces.DEFAULT), old).id)
    report = assembly_of(database, ask(api, "And now?", conversation))
    recent = report["parts"]["recent"]
    (left,) = [one for one in report["left_out"] if one["part"] == "recent"]
    assert (left["first_seq"], left["last_seq"]) == (1, recent["first_seq"] - 1)
    assert "before the window" in left["reason"]
    assert report["context"]["prompt"] + report["context"]["answer"] <= report["context"]["window"]


def _first_run(database: Database) -> UUID:
    """Wait for the run of a call that has begun to write."""
    limit = time.monotonic() + PATIENCE
    while not (found := views.page(database, limit=1).runs):
        assert time.monotonic() < limit
        threading.Event().wait(0.02)
    return found[0].id


def test_a_conversation_deleted_meanwhile_fails_the_call(
    api: str, start_pool: StartPool, database: Database, service: Conversations, conversation: str
) -> None:
    pool = start_pool(tokens_per_second=5)
    answers: list[httpx2.Response] = []
    thread = threading.Thread(target=lambda: answers.append(ask(api, "Hello.", conversation, max_tokens=10)))
    thread.start()
    run = _first_run(database)
    found = parsed_conversation(conversation)
    with database.work() as work:
        work.execute(_DELETE, {"id": found})
    thread.join()
    assert pool.pool_id
    assert answers[0].status_code == 400
    assert "cannot be kept" in answers[0].text
    assert until_state(database, run, "failed").steps[0].error is not None


def test_a_response_continues_a_conversation_and_another_one_branches_off_it(
    api: str, start_pool: StartPool, service: Conversations, conversation: str
) -> None:
    start_pool()
    ask(api, "My ship is called Mira.", conversation)
    with openai.OpenAI(base_url=f"{api}/v1", api_key="none") as client:
        first = client.responses.create(
            model=MODEL, input="And my dog?", conversation=conversation, max_output_tokens=8
        )
        assert first.conversation is not None
        assert first.conversation.id == conversation
        ask(api, "A later turn.", conversation)
        branch = client.responses.create(
            model=MODEL, input="Which ship?", previous_response_id=first.id, max_output_tokens=8
        )
        with pytest.raises(openai.BadRequestError, match="cannot be used together"):
            client.responses.create(model=MODEL, input="No.", conversation=conversation, previous_response_id=first.id)
    assert [one.content for one in said(service, conversation) if one.role is MessageRole.USER] == [
        "My ship is called Mira.",
        "And my dog?",
        "A later turn.",
    ]
    # What was said up to that response, and the new input: the later turn is not there.
    contents = [one.content for one in said(service, conversation)][:4]
    assert branch.usage is not None
    assert branch.usage.input_tokens == len("".join([*contents, "Which ship?"])) // 4


def test_a_step_and_a_call_have_the_same_history(
    api: str, start_pool: StartPool, database: Database, service: Conversations, conversation: str, runs: Runs
) -> None:
    pool = start_pool()
    ask(api, "My ship is called Mira.", conversation)
    step = {
        "id": "say",
        "kind": "generate",
        "model": MODEL,
        "conversation": "{{ inputs.conversation }}",
        "system": "Be brief.",
        "prompt": "Say its name.",
        "max_tokens": 8,
    }
    document = {"workflow": "continue", "inputs": {"conversation": {"type": "string"}}, "steps": [step]}
    made = runs.submit(Submission(definitions.from_document(document), {"conversation": conversation}))
    (waiting,) = views.run(database, made.id).steps
    steps.run_step(pool.runtime, waiting.id, waiting.attempt)
    view = until_state(database, made.id, "succeeded")
    assert view.attempts[view.steps[0].id][0].assembly is not None
    last = assembly_of(database, ask(api, "And now?", conversation))
    assert last["parts"]["recent"]["messages"] == 4
    found = said(service, conversation)
    assert [(one.content, one.step_key) for one in found if one.role is MessageRole.USER] == [
        ("My ship is called Mira.", "answer"),
        ("Say its name.", "say"),
        ("And now?", "answer"),
    ]
    assert found[3].content == view.steps[0].output


def test_an_agent_has_the_prompt_that_a_call_has(
    api: str, start_pool: StartPool, database: Database, service: Conversations, runs: Runs
) -> None:
    """What was said long ago is recalled, its window is that of the context, and later turns see the same messages."""
    pool = start_pool()
    old = [NewMessage(MessageRole.USER, "Greta keeps the key of the mill in box 4711-B.")]
    old += [
        NewMessage(MessageRole.ASSISTANT if n % 2 == 0 else MessageRole.USER, f"{n} " + "weather " * 60)
        for n in range(201)
    ]
    conversation = shown_conversation(service.create(NewConversation(namespaces.DEFAULT), old).id)
    step = {
        "id": "helper",
        "kind": "agent",
        "model": MODEL,
        "conversation": "{{ inputs.conversation }}",
        "system": "Be brief.",
        "prompt": "Where does Greta keep the key of the mill?",
        "max_tokens": 64,
        "limits": {"turns": 2},
        "tools": [{"memory": ["query_memory"]}],
    }
    document = {"workflow": "helping", "inputs": {"conversation": {"type": "string"}}, "steps": [step]}
    made = runs.submit(Submission(definitions.from_document(document), {"conversation": conversation}))
    worker = StepWorker(runs)
    while ready := worker.ready(made.id):
        for one in ready:
            steps.run_step(pool.runtime, one.id, one.attempt)
    until_state(database, made.id, "succeeded")

    turn, call, last_turn = worker.items(made.id, "helper")
    assert (turn.state, call.kind, last_turn.state) == ("succeeded", "call", "succeeded")
    with database.work() as work:
        (attempt,) = work.rows(_ATTEMPTS, {"step": turn.id})
        (later,) = work.rows(_ATTEMPTS, {"step": last_turn.id})
    assert later.assembly is None
    assert later.tokens_in > attempt.tokens_in, "the same messages, the call, and its result"
    report = attempt.assembly
    assert report["conversation"] == conversation
    assert report["parts"]["recent"]["first_seq"] > 1
    assert [one["seq"] for one in report["parts"]["recalled"]["used"]][:1] == [1]
    assert attempt.tokens_in + 64 <= report["context"]["window"], "with the description of the tools"
    messages = turn.output["messages"]
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert "box 4711-B" in messages[-1]["content"], "recalled, before the prompt"
    assert messages[-1]["content"].endswith("Where does Greta keep the key of the mill?")
    assert len(messages) - 2 == report["parts"]["recent"]["messages"]
    last = said(service, conversation)[-1]
    assert (last.role, last.step_key) == (MessageRole.ASSISTANT, "helper")
    assert [one.content for one in said(service, conversation)].count(step["prompt"]) == 1


def test_what_was_said_long_ago_is_recalled_into_the_last_message(
    api: str, start_pool: StartPool, database: Database, service: Conversations
) -> None:
    start_pool()
    old = [NewMessage(MessageRole.USER, "Greta keeps the key of the mill in box 4711-B.")]
    old += [
        NewMessage(MessageRole.ASSISTANT if n % 2 == 0 else MessageRole.USER, f"{n} " + "weather " * 60)
        for n in range(201)
    ]
    conversation = shown_conversation(service.create(NewConversation(namespaces.DEFAULT), old).id)
    report = assembly_of(database, ask(api, "Where does Greta keep the key of the mill?", conversation))
    assert report["parts"]["recent"]["first_seq"] > 1
    assert [one["seq"] for one in report["parts"]["recalled"]["used"]][:1] == [1]
    silent = assembly_of(
        database, ask(api, "Where does Greta keep the key of the mill?", conversation, memory={"recalled": 0})
    )
    assert "recalled" not in silent["parts"]


def test_a_memory_in_a_prompt_counts_as_used(api: str, start_pool: StartPool, database: Database) -> None:
    start_pool()
    new = NewMemory("Greta keeps the key of the mill in box 4711-B.", MemoryKind.FACT)
    made = memories.remember(database, new, namespaces.DEFAULT, "user").memory
    given = body(messages=[{"role": "user", "content": "Where does Greta keep the key?"}], memory={"recalled": 200})
    answer = httpx2.post(f"{api}/v1/chat/completions", json=given, timeout=PATIENCE)
    assert assembly_of(database, answer)["parts"]["recalled"]["used"]
    assert memories.get(database, memories.shown(made.id), namespaces.DEFAULT).uses == 1


def test_unknown_memory_options_are_refused_by_name(api: str, start_pool: StartPool, conversation: str) -> None:
    start_pool()
    answer = ask(api, "Hello.", conversation, memory={"recal": 0})
    assert answer.status_code == 400
    assert "recal" in answer.text

"""
The conversation of an agent: its prompt begins with what the platform assembles of it, and the prompt and the answer
are appended.

The first turn assembles, in its pool, as for a chat completion; later turns see the same messages, which are part of
its output. The prompt and the answer are appended when the agent has ended, once: a decision that is made again finds
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from uuid import UUID

from sqlalchemy import text

from app.inference.requests import ChatMessage, Generated, GenerateRequest
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import ArrieroError, DatabaseUnreachable, FailureReason, NotFound, StepFailure
from app.kernel.sections.memory import ConversationSettings
from app.memory.conversations.message import MessageRole, NewMessage
from app.memory.conversations.service import Conversations, parsed_conversation
from app.memory.summaries import store as summary_store
from app.workflows.state_machine.outcomes import Failure, Success
from workers.engine import Engine
from workers.memory import assembly, run_links, summary_runs
from workers.memory.assembly import AssembledPrompt, AssemblyTask
from workers.runtime import Runtime

#: The share of the context that is left for calls and their results, for an answer, and the most tokens for that.
_LOOP_SHARE, _ANSWER_SHARE, _MOST_FOR_ANSWER = 0.25, 0.25, 1_024
#: Most tokens of an assembled prompt: it is stored with the run.
_MOST_TOKENS = 100_000
#: Tries to fit a prompt whose tools are described in it.
_TRIES = 3
_APPENDED = text(
    "SELECT 1 FROM conversation_message WHERE conversation_id = :id AND run_id = :run_id AND step_key = :key"
)


def require(database: Database, settings: ConversationSettings, shown: str, namespace: str, run_id: UUID) -> None:
    """Note the run as one of a conversation. Raises StepFailure when there is no such conversation."""
    service = Conversations(database, settings)
    try:
        found = service.get(parsed_conversation(shown), namespace, shown)
    except NotFound as error:
        raise StepFailure(FailureReason.INVALID_REQUEST, str(error)) from error
    # Also if the agent fails and appends nothing: its record has messages of it.
    run_links.link(database, run_id, [found.id])


def assemble(
    runtime: Runtime,
    engine: Engine,
    task: AssemblyTask,
    opening: Sequence[ChatMessage],
    request_of: Callable[[Sequence[ChatMessage]], GenerateRequest],
) -> tuple[AssembledPrompt, GenerateRequest]:
    """
    Return the prompt of the first turn, and its request, which `request_of` makes of the messages.

    A part of the context is left for the answer, and one for calls and results unless the messages need it. Raises
    StepFailure.
    """
    try:
        return _assembled(runtime, engine, task, opening, request_of, int(engine.window * _LOOP_SHARE))
    except StepFailure as error:
        if error.reason != FailureReason.CONTEXT_EXCEEDED:
            raise
    return _assembled(runtime, engine, task, opening, request_of, 0)


def _assembled(
    runtime: Runtime,
    engine: Engine,
    task: AssemblyTask,
    opening: Sequence[ChatMessage],
    request_of: Callable[[Sequence[ChatMessage]], GenerateRequest],
    for_loop: int,
) -> tuple[AssembledPrompt, GenerateRequest]:
    first = request_of(opening)
    answer = min(first.max_tokens, int(engine.window * _ANSWER_SHARE), _MOST_FOR_ANSWER)
    reserve = max(answer + for_loop, engine.window - _MOST_TOKENS)
    tries = 0
    while True:
        given = replace(first, messages=tuple(opening), max_tokens=reserve, fits_context=False)
        found = assembly.assemble(runtime, engine, task, given)
        request = request_of(found.request.messages)
        # Tools that the chat template does not have are described in the prompt, which has more tokens then.
        excess = engine.count(request) + answer - engine.window
        tries += 1
        if excess <= 0 or tries == _TRIES:
            return found, request
        reserve += excess


def noted(found: AssembledPrompt, done: Success, generated: Generated) -> Success:
    """Return the outcome of the first turn with what its record writes: where the window of the conversation began."""
    done = found.success(done, generated)
    conversation, used = found.conversation, done.within
    assert conversation is not None, "the agent has one"

    def within(work: UnitOfWork) -> None:
        service = assembly.conversations_of(found.runtime)
        try:
            service.get_in(work, conversation.id, conversation.namespace, lock=True)
        except NotFound as error:
            raise StepFailure(FailureReason.INVALID_REQUEST, f"the conversation was deleted: {error}") from None
        model = found.task.model
        summary_store.keep_window(work, conversation.id, conversation.revision, model, found.plan.window)
        if used is not None:
            used(work)

    def recorded(outcome: Success | Failure) -> None:
        if isinstance(outcome, Success):
            model = found.task.model
            summary_runs.submit_if_due(found.runtime, conversation, model, found.plan, generated.tokens_out)

    return replace(done, within=within, recorded=recorded)


def append(
    database: Database,
    settings: ConversationSettings,
    shown: str,
    namespace: str,
    said: Sequence[ChatMessage],
    *,
    model: str | None,
    run_id: UUID,
    key: str,
) -> None:
    """Append the prompt and the answer, unless that was done. Raises StepFailure."""
    service = Conversations(database, settings)
    new = [
        NewMessage(
            MessageRole(one.role),
            one.content,
            model=model if one.role == "assistant" else None,
            run_id=run_id,
            step_key=key,
        )
        for one in said
    ]
    try:
        with database.work() as work:
            found = service.get_in(work, parsed_conversation(shown), namespace, shown, lock=True)
            if work.row(_APPENDED, {"id": found.id, "run_id": run_id, "key": key}) is None:
                service.append_in(work, found.id, new)
    except DatabaseUnreachable:
        raise
    except ArrieroError as error:
        raise StepFailure(FailureReason.INVALID_REQUEST, f"the answer cannot be appended: {error}") from error

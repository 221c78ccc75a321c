"""
Prompt assembly in a pool: reads a conversation and what belongs to it, and puts the prompt of a request together.

The model's own tokenizer and chat template count. The messages of the request and the answer are appended in the
transaction that records the success of the step: once, and not at all when it fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from uuid import UUID

from app.inference.openai import answers
from app.inference.openai.chat import ChatRequest
from app.inference.requests import ChatMessage, Generated, GenerateRequest
from app.kernel import log
from app.kernel.database import UnitOfWork
from app.kernel.errors import ArrieroError, DatabaseUnreachable, FailureReason, InvalidInput, NotFound, StepFailure
from app.memory.assembly import plan as planner
from app.memory.assembly import rendering
from app.memory.assembly.parts import PromptCandidate, PromptPart
from app.memory.assembly.plan import AssemblyPlan, Known, PromptTooLong
from app.memory.assembly.window import CountedMessage, PromptWindow
from app.memory.conversations import store as conversation_store
from app.memory.conversations.chat import chat_messages
from app.memory.conversations.conversation import StoredConversation
from app.memory.conversations.message import MessageRole, NewMessage, StoredCall, StoredMessage
from app.memory.conversations.service import Conversations, parsed_conversation
from app.memory.memories import service as memory_service
from app.memory.recall.passages import SourceKind
from app.memory.summaries import store as summary_store
from app.workflows.language.memory_options import MemoryOptions
from app.workflows.state_machine.outcomes import Failure, Success
from workers.engine import Engine
from workers.memory import sources, summary_runs
from workers.memory.sources import Sought
from workers.runtime import Runtime

_log = log.get(__name__)

#: Messages that are read at a time, and most system messages at the beginning of a conversation.
_PAGE, _MAX_SYSTEM = 100, 8
#: The last messages that are looked for in Redis, and a place behind every message.
_HOT, _END = 64, conversation_store.END
#: How far beyond the room messages are read: where the window moves, its old ones are counted too.
_BEYOND = 1.5
#: The share of the window that is left for an answer without a limit of its own, and the most tokens for that.
_ANSWER_SHARE, _MOST_FOR_ANSWER = 0.25, 1_024
#: Tries to fit a prompt whose parts were counted one by one.
_TRIES = 5
#: Most characters of a message that are looked for.
_QUERY = 4_000
_LEADING = (MessageRole.SYSTEM, MessageRole.DEVELOPER)


@dataclass(frozen=True, slots=True)
class AssemblyTask:
    """A request whose prompt is put together."""

    namespace: str
    model: str
    run_id: UUID
    step_key: str
    #: The conversation, as the client named it; None for memory without a conversation.
    conversation: str | None
    user: str | None
    options: MemoryOptions
    #: The messages of the request, without those of the system.
    messages: tuple[NewMessage, ...]


@dataclass(frozen=True, slots=True)
class AssembledPrompt:
    """A prompt that was put together."""

    task: AssemblyTask
    request: GenerateRequest
    plan: AssemblyPlan
    report: Mapping[str, Any]
    conversation: StoredConversation | None
    runtime: Runtime

    def success(self, done: Success, generated: Generated) -> Success:
        """Return the outcome with what its record writes: the turn, and where its window began."""
        usage = replace(done.usage, assembly=self.report)
        memories = [one.about["source_id"] for one in self.plan.recalled if one.about["source"] == SourceKind.MEMORY]
        noted = partial(memory_service.note_used_in, ids=memories) if memories else None
        if self.conversation is None or not self.task.options.store:
            return replace(done, usage=usage, within=noted)
        calls = tuple(
            StoredCall(answers.call_id(str(self.task.run_id), 0, place), call.name, answers.arguments_of(call))
            for place, call in enumerate(generated.tool_calls)
        )
        answer = NewMessage(
            MessageRole.ASSISTANT,
            generated.text,
            calls=calls,
            model=self.task.model,
            tokens=generated.tokens_out,
            run_id=self.task.run_id,
            step_key=self.task.step_key,
        )
        found = self.conversation

        def within(work: UnitOfWork) -> None:
            self._append(work, found, answer)
            if noted is not None:
                noted(work)

        def recorded(outcome: Success | Failure) -> None:
            if isinstance(outcome, Success):
                summary_runs.submit_if_due(self.runtime, found, self.task.model, self.plan, generated.tokens_out)

        return replace(done, usage=usage, within=within, recorded=recorded)

    def _append(self, work: UnitOfWork, found: StoredConversation, answer: NewMessage) -> None:
        """Raises StepFailure when the conversation was deleted meanwhile, or is full."""
        try:
            conversations_of(self.runtime).append_in(work, found.id, [*self.task.messages, answer])
        except DatabaseUnreachable:
            raise
        except ArrieroError as error:
            raise StepFailure(FailureReason.INVALID_REQUEST, f"the turn cannot be kept: {error}") from None
        summary_store.keep_window(work, found.id, found.revision, self.task.model, self.plan.window)


def conversations_of(runtime: Runtime) -> Conversations:
    """Return the conversations of this process's database."""
    return Conversations(runtime.runs.database, runtime.settings.conversations)


def of_chat(request: ChatRequest, namespace: str, run_id: UUID, step_key: str) -> AssemblyTask:
    """Return the task of a chat completion."""
    new = tuple(
        NewMessage(
            MessageRole(message.role),
            message.translated().content,
            speaker=message.name,
            calls=tuple(
                StoredCall(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()
            ),
            call_id=message.tool_call_id,
            run_id=run_id,
            step_key=step_key,
        )
        for message in request.messages
        if MessageRole(message.role) not in _LEADING
    )
    options = request.memory or MemoryOptions()
    return AssemblyTask(namespace, request.model, run_id, step_key, request.conversation_id, request.user, options, new)


def of_messages(
    messages: Sequence[ChatMessage],
    *,
    namespace: str,
    model: str,
    run_id: UUID,
    step_key: str,
    conversation: str | None,
    user: str | None,
    options: MemoryOptions,
) -> AssemblyTask:
    """Return the task of the messages of a step."""
    new: list[NewMessage] = []
    for message in messages:
        if message.role == "system":
            continue
        calls = tuple(
            StoredCall(f"call_{run_id.hex}_{len(new)}_{place}", call.name, answers.arguments_of(call))
            for place, call in enumerate(message.tool_calls)
        )
        new.append(
            NewMessage(MessageRole(message.role), message.content, calls=calls, run_id=run_id, step_key=step_key)
        )
    return AssemblyTask(namespace, model, run_id, step_key, conversation, user, options, tuple(new))


def assemble(runtime: Runtime, engine: Engine, task: AssemblyTask, request: GenerateRequest) -> AssembledPrompt:
    """
    Return the prompt of a request. `request` has its messages, tools and limits.

    Raises StepFailure: the conversation is not there, or the messages do not fit the context.
    """
    room, answer = _room(engine, request)
    own_system = [message.content for message in request.messages if message.role == "system"]
    new = [message for message in request.messages if message.role != "system"]
    if not new:
        raise StepFailure(FailureReason.INVALID_REQUEST, "the request has no message beside system messages")
    conversation, window, summaries = _known(runtime, engine, task)
    user = _user(conversation, task)
    messages = _Messages(runtime, engine, conversation)
    system, begins_at = messages.system()
    history = messages.last(window, begins_at, room)
    system += own_system
    base = engine.count(replace(request, messages=(*_as_system(system), *new)))
    overhead = runtime.token_counts.overhead(engine)
    contents = [message.content for message in new]
    request_tokens = min(sum(engine.count_texts(contents)) + overhead * len(new), base)
    sought = Sought(
        task.namespace, user, None if conversation is None else conversation.id, _query(task, new), task.options
    )
    before = None if conversation is None else begins_at if window is None else window.first_seq
    if window is None and history:
        before = history[0][0].seq
    recall = runtime.recall
    found = sources.find(runtime.runs.database, recall, engine, sought, before)
    counted = [CountedMessage(message.seq, tokens, message.role is MessageRole.USER) for message, tokens in history]
    known = Known(
        base - request_tokens,
        request_tokens,
        found.parts.get(PromptPart.BLOCKS, ()),
        found.parts.get(PromptPart.PERSONAL, ()),
        found.parts.get(PromptPart.RECALLED, ()),
        summaries,
        counted,
        bool(counted) and counted[0].seq > begins_at,
        begins_at,
        window,
        frozenset(found.parts) | ({PromptPart.SUMMARY} if conversation is not None else frozenset()),
    )
    budgets = task.options.model_dump(include={part.value for part in PromptPart})
    planned, prompt, tokens = _fitted(engine, request, known, room, budgets, system, history, new)
    if PromptPart.RECALLED in found.parts and before is not None and planned.window.first_seq != before:
        # What has just left the window can be recalled, too.
        known = replace(known, recalled=sources.recalled(recall, engine, sought, planned.window.first_seq))
        planned, prompt, tokens = _fitted(engine, request, known, room, budgets, system, history, new)
    report = {
        **({} if conversation is None else {"conversation": task.conversation}),
        "context": {"window": engine.window, "answer": answer, "prompt": tokens},
        "counted": "exactly" if engine.counts_exactly else "estimated",
        **planned.report(),
        **({"problems": list(found.problems)} if found.problems else {}),
    }
    return AssembledPrompt(task, prompt, planned, report, conversation, runtime)


def _fitted(
    engine: Engine,
    request: GenerateRequest,
    known: Known,
    room: int,
    budgets: Mapping[str, int | None],
    system: Sequence[str],
    history: Sequence[tuple[StoredMessage, int]],
    new: Sequence[ChatMessage],
) -> tuple[AssemblyPlan, GenerateRequest, int]:
    """The plan whose prompt has at most `room` tokens as the chat template renders it, the prompt, and its tokens."""
    target = room
    tokens = 0
    for _ in range(_TRIES):
        try:
            planned = planner.plan(known, target, budgets)
        except PromptTooLong as error:
            raise StepFailure(FailureReason.CONTEXT_EXCEEDED, _too_long(error.tokens, room, engine)) from None
        recent = [message for message, _ in history if message.seq >= planned.window.first_seq]
        messages = rendering.messages(
            rendering.system_text(system, planned.blocks, planned.summary),
            chat_messages(recent),
            new,
            rendering.context_text(planned.personal, planned.recalled),
        )
        prompt = replace(request, messages=tuple(messages), truncates=False)
        tokens = engine.count(prompt)
        if tokens <= room:
            return planned, prompt, tokens
        target -= tokens - room
    raise StepFailure(FailureReason.CONTEXT_EXCEEDED, _too_long(tokens, room, engine))


def _too_long(tokens: int, room: int, engine: Engine) -> str:
    return (
        f"the messages of the request with the system messages have {tokens} tokens; the context of {engine.window} "
        f"tokens leaves {room} beside the answer"
    )


def _room(engine: Engine, request: GenerateRequest) -> tuple[int, int]:
    """Tokens for the prompt, and those that are left for the answer."""
    answer = request.max_tokens
    if request.fits_context:
        answer = min(int(engine.window * _ANSWER_SHARE), _MOST_FOR_ANSWER, request.max_tokens)
    room = engine.window - answer
    if room <= 0:
        message = f"max_tokens is {answer}, and the context has {engine.window} tokens: nothing is left for a prompt"
        raise StepFailure(FailureReason.CONTEXT_EXCEEDED, message)
    return room, answer


def _conversation(work: UnitOfWork, runtime: Runtime, task: AssemblyTask) -> StoredConversation:
    assert task.conversation is not None, "the caller has checked it"
    try:
        found = conversations_of(runtime).get_in(
            work, parsed_conversation(task.conversation), task.namespace, task.conversation[:200]
        )
    except (NotFound, InvalidInput) as error:
        raise StepFailure(FailureReason.INVALID_REQUEST, str(error)) from None
    # Also if the call fails: the run holds texts of the conversation, and goes when that is deleted.
    conversation_store.link_runs(work, found.id, {task.run_id})
    return found


def _user(conversation: StoredConversation | None, task: AssemblyTask) -> str | None:
    """Whose memory is used."""
    own = None if conversation is None else conversation.user
    if own is not None and task.user is not None and own != task.user:
        message = f"user is {task.user!r}, and the conversation belongs to the user {own!r}; leave user out"
        raise StepFailure(FailureReason.INVALID_REQUEST, message)
    return task.user if own is None else own


class _Messages:
    """Reads the messages of a conversation: the last ones from Redis, where they are."""

    def __init__(self, runtime: Runtime, engine: Engine, conversation: StoredConversation | None) -> None:
        self._runtime, self._engine, self._conversation = runtime, engine, conversation
        self._hot = () if conversation is None or runtime.hot is None else runtime.hot.recent(conversation, _HOT)

    def system(self) -> tuple[list[str], int]:
        """Return the system messages with which the conversation begins, and the place after them."""
        found: list[str] = []
        place = 1
        for message in self._read(1, _END, _MAX_SYSTEM, newest_first=False):
            if message.role not in _LEADING:
                break
            found.append(message.content)
            place = message.seq + 1
        return found, place

    def last(self, window: PromptWindow | None, begins_at: int, room: int) -> list[tuple[StoredMessage, int]]:
        """Return the last messages in order with their tokens: as many as fit, or all since the last window began."""
        if self._conversation is None:
            return []
        first = begins_at if window is None else max(window.first_seq, begins_at)
        end, total = self._conversation.next_seq, 0
        found: list[tuple[StoredMessage, int]] = []
        while end > begins_at and total <= room * _BEYOND:
            page = self._read(begins_at, end, _PAGE, newest_first=True)
            if not page:
                break
            for message, tokens in zip(page, self._runtime.token_counts.of(self._engine, page), strict=True):
                found.append((message, tokens))
                total += tokens
            end = page[-1].seq
            if end <= first:
                break
        return found[::-1]

    def _read(self, first: int, end: int, limit: int, *, newest_first: bool) -> list[StoredMessage]:
        if self._conversation is None:
            return []
        hot = [message for message in self._hot if first <= message.seq < end]
        is_whole = len(self._hot) == self._conversation.messages
        if newest_first and hot:
            return hot[::-1][:limit]
        if is_whole:
            return hot[:limit]
        with self._runtime.runs.database.work() as work:
            return conversation_store.read(
                work, self._conversation.id, first=first, end=end, limit=limit, newest_first=newest_first
            )


def _known(
    runtime: Runtime, engine: Engine, task: AssemblyTask
) -> tuple[StoredConversation | None, PromptWindow | None, tuple[PromptCandidate, ...]]:
    """The conversation, the window of its last prompt, and its summaries. The run is noted as one of its runs."""
    if task.conversation is None:
        return None, None, ()
    with runtime.runs.database.work() as work:
        found = _conversation(work, runtime, task)
        window = summary_store.window(work, found.id, found.revision, task.model)
        return found, window, _summaries(work, engine, found, window)


def _summaries(
    work: UnitOfWork, engine: Engine, conversation: StoredConversation, window: PromptWindow | None
) -> tuple[PromptCandidate, ...]:
    """The latest summary, and the one of the window before."""
    found = summary_store.latest(work, conversation.id, conversation.revision)
    before = 0 if window is None else window.summarised_upto
    if before and not any(one.upto_seq == before for one in found):
        earlier = summary_store.at(work, conversation.id, conversation.revision, before)
        found += [] if earlier is None else [earlier]
    texts = engine.count_texts([one.text for one in found])
    return tuple(
        PromptCandidate(summary_runs.shown_summary(one.id), one.text, tokens, seq=one.upto_seq)
        for one, tokens in zip(found, texts, strict=True)
    )


def _query(task: AssemblyTask, new: Sequence[ChatMessage]) -> str:
    if task.options.query is not None:
        return task.options.query
    return next((message.content for message in reversed(new) if message.role == "user"), "")[:_QUERY]


def _as_system(texts: Sequence[str]) -> list[ChatMessage]:
    text = rendering.system_text(texts, (), None)
    return [ChatMessage("system", text)] if text else []

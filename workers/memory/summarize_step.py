"""
The execution of `summarize` steps: a model reads what was said since the last summary, part by part.

What it writes is checked against what it read (`app/memory/compression/summary.py`). The summary is stored before the
step ends; a second attempt finds it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from app.inference.requests import ChatMessage, FinishReason, GenerateRequest, PriorityClass, Sampling
from app.kernel.database import Database
from app.kernel.errors import FailureReason, NotFound, StepFailure
from app.memory.assembly import window
from app.memory.assembly.window import CountedMessage
from app.memory.compression import conversation as conversations
from app.memory.compression import summary
from app.memory.compression.conversation import Protection, Turn
from app.memory.conversations import store as conversation_store
from app.memory.conversations.conversation import StoredConversation
from app.memory.conversations.message import MessageRole, StoredMessage
from app.memory.conversations.service import Conversations, parsed_conversation, shown_conversation
from app.memory.summaries import store
from app.memory.summaries.summary import NewSummary, StoredSummary
from app.workflows.language.summarize import SummarizeFields
from app.workflows.state_machine.outcomes import Success, TokenUsage
from workers.engine import Engine, OnStop
from workers.memory import run_links
from workers.memory.counting import TokenCounts
from workers.memory.summary_runs import shown_summary

#: Most messages that one summary reads.
_MOST_MESSAGES = 2_000
#: Share of the measured characters for each token that a part may have.
_CAUTION = 0.7
#: Least characters of a part.
_LEAST_PART = 200
_GREEDY = Sampling(temperature=0.0)
_LEADING = (MessageRole.SYSTEM, MessageRole.DEVELOPER)


@dataclass(frozen=True, slots=True)
class _Source:
    """What is summarised."""

    found: StoredConversation
    previous: StoredSummary | None
    messages: Sequence[StoredMessage]
    #: Of all messages since the summary before, with those that are left out.
    tokens: Sequence[int]


def summarize(
    step: SummarizeFields,
    conversation: str,
    service: Conversations,
    database: Database,
    engine: Engine,
    counts: TokenCounts,
    *,
    namespace: str,
    model: str,
    run_id: UUID,
    priority: str,
    on_stop: OnStop,
    timeout: timedelta,
) -> Success:
    """Return the summary. Raises StepFailure, and CancelledError when the step was cancelled."""
    source = _read(step, conversation, service, database, engine, counts, namespace)
    if not source.messages:
        return Success(None)
    run_links.link(database, run_id, [source.found.id])
    turns = [
        *([Turn(source.previous.text, "summary")] if source.previous is not None else []),
        *(Turn(message.content, message.role.value, message.speaker or "") for message in source.messages),
    ]
    try:
        sentences = conversations.of_turns(turns, Protection(), strip=False).sentences
    except conversations.TooManySentences as error:
        raise StepFailure(FailureReason.INVALID_REQUEST, f"the messages cannot be summarised: {error}") from None
    first = 0 if source.previous is None else 1
    new = [sentence for sentence in sentences if sentence.turn >= first]
    parts = summary.parts(new, turns, _characters(step, source, engine))
    writer = _Writer(engine, step.max_tokens, PriorityClass(priority), on_stop, timeout)
    written = "" if source.previous is None else source.previous.text
    for part in parts:
        written = writer.write(part, written)
    checked = summary.checked(written, sentences, lambda text: engine.count_texts([text])[0], step.max_tokens)
    text = checked.text.removeprefix(summary.OPENING)
    if not text:
        raise StepFailure(FailureReason.INVALID_OUTPUT, "the model wrote nothing that the messages say", text=written)
    with database.work() as work:
        stored = store.put_in(
            work,
            NewSummary(
                source.found.id,
                source.found.revision,
                source.messages[0].seq,
                source.messages[-1].seq,
                None if source.previous is None else source.previous.id,
                model,
                text,
                engine.count_texts([text])[0],
                len(checked.removed),
                checked.added,
                checked.missing,
                run_id,
            ),
        )
    if stored is None:
        message = "the conversation was deleted, or a message of it, while it was summarised"
        raise StepFailure(FailureReason.INVALID_REQUEST, message)
    return Success(_output(stored), writer.usage)


def _read(
    step: SummarizeFields,
    conversation: str,
    service: Conversations,
    database: Database,
    engine: Engine,
    counts: TokenCounts,
    namespace: str,
) -> _Source:
    with database.work() as work:
        try:
            found = service.get_in(work, parsed_conversation(conversation), namespace, conversation[:200])
        except NotFound as error:
            raise StepFailure(FailureReason.INVALID_REQUEST, str(error)) from None
        previous = next(iter(store.latest(work, found.id, found.revision)), None)
        after = 0 if previous is None else previous.upto_seq
        messages = conversation_store.read(work, found.id, first=after + 1, limit=_MOST_MESSAGES)
    if previous is None:
        begin = next((at for at, one in enumerate(messages) if one.role not in _LEADING), len(messages))
        messages, after = messages[begin:], messages[begin - 1].seq if begin else 0
    tokens = counts.of(engine, messages)
    counted = [
        CountedMessage(message.seq, count, message.role is MessageRole.USER)
        for message, count in zip(messages, tokens, strict=True)
    ]
    upto = window.cut(counted, step.keep_tokens, after)
    chosen = [] if upto is None else [message for message in messages if message.seq <= upto]
    return _Source(found, previous, _readable(step, chosen, tokens, engine), tokens)


def _readable(
    step: SummarizeFields, messages: Sequence[StoredMessage], tokens: Sequence[int], engine: Engine
) -> Sequence[StoredMessage]:
    """The first messages, up to a turn, that so many parts as are allowed can hold."""
    most = (engine.window - 2 * step.max_tokens - summary.INSTRUCTION) * _CAUTION * (summary.MAX_PARTS - 1)
    total, begin = 0.0, 0
    for at, message in enumerate(messages):
        total += tokens[at]
        if total > most:
            return messages[: begin or max(at, 1)]
        if message.role is MessageRole.USER:
            begin = at
    return messages


def _characters(step: SummarizeFields, source: _Source, engine: Engine) -> int:
    """Characters of a part."""
    tokens = engine.window - 2 * step.max_tokens - summary.INSTRUCTION
    text = sum(len(message.content) for message in source.messages)
    count = sum(source.tokens[: len(source.messages)])
    room = int(tokens * text / max(count, 1) * _CAUTION)
    if room < _LEAST_PART:
        message = f"the context of {engine.window} tokens is too small for a summary of {step.max_tokens} tokens"
        raise StepFailure(FailureReason.INVALID_REQUEST, message)
    return room


class _Writer:
    """Asks the model for one part after the other."""

    def __init__(self, engine: Engine, most: int, priority: PriorityClass, on_stop: OnStop, timeout: timedelta) -> None:
        self._engine, self._most, self._priority, self._on_stop = engine, most, priority, on_stop
        self._until = time.monotonic() + timeout.total_seconds()
        self._seconds = timeout.total_seconds()
        self._stopped = threading.Event()
        self.usage = TokenUsage()

    def write(self, part: str, earlier: str) -> str:
        """Return the summary with a further part. Raises StepFailure, CancelledError."""
        if self._stopped.is_set():
            raise CancelledError
        message = ChatMessage("user", summary.prompt(part, earlier, max(15, self._most // 2)))
        request = GenerateRequest(
            (message,), max_tokens=self._most, sampling=_GREEDY, priority=self._priority, truncates=False
        )
        ticket = self._engine.generate(request)

        def stop() -> None:
            self._stopped.set()
            ticket.cancel()

        self._on_stop(stop)
        try:
            generated = ticket.result(max(0.0, self._until - time.monotonic()))
        except TimeoutError:
            ticket.cancel()
            raise StepFailure(FailureReason.TIMEOUT, f"not summarised within {self._seconds:g} s") from None
        used = self.usage
        self.usage = TokenUsage(
            used.tokens_in + generated.tokens_in,
            used.tokens_out + generated.tokens_out,
            used.tokens_cached + generated.tokens_cached,
            used.first_token or generated.time_to_first,
            generated.finish.value,
        )
        return _whole_sentences(generated.text) if generated.finish is FinishReason.LENGTH else generated.text


def _whole_sentences(text: str) -> str:
    """A text that was cut, without its last sentence if there are others."""
    end = max(text.rfind(mark) for mark in (". ", "! ", "? ", "。"))
    return text[: end + 1] if end > 0 else text


def _output(stored: StoredSummary) -> dict[str, Any]:
    return {
        "id": shown_summary(stored.id),
        "conversation": shown_conversation(stored.conversation_id),
        "text": stored.text,
        "tokens": stored.tokens,
        "first_seq": stored.first_seq,
        "upto_seq": stored.upto_seq,
        "previous": None if stored.previous_id is None else shown_summary(stored.previous_id),
        "sentences_removed": stored.sentences_removed,
        "identifiers_added": stored.identifiers_added,
        "identifiers_missing": stored.identifiers_missing,
    }

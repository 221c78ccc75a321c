"""
The extraction of memories from conversations, in the background.

New messages of a conversation whose memory is on are read by a run of the class `batch`. Its proposals pass the write
gate; those that do are written, with the cursor, in one transaction. So nothing is read twice and nothing is lost when
a process dies in between: the run is then found again. The run is removed when its result is written, because it
holds the texts of messages.

A part that a model cannot answer is tried three times, with fewer messages each time, and then skipped; other failures
are tried again later. A conversation that raises is left for later, and does not stop the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from app.access import namespaces
from app.catalog.catalog import Catalog
from app.files.file import parsed_id
from app.kernel import ids, log
from app.kernel.database import UnitOfWork
from app.kernel.errors import (
    Conflict,
    DatabaseUnreachable,
    FailureReason,
    InvalidInput,
    NotFound,
    RowsLocked,
    shortened,
)
from app.kernel.sections.memories import MemorySettings
from app.memory.conversations import store as conversation_store
from app.memory.conversations.conversation import StoredConversation
from app.memory.conversations.message import StoredMessage
from app.memory.memories import cursors, gate, prompt, service, store
from app.memory.memories.cursors import EndedExtraction, ExtractionState
from app.memory.memories.gate import GateDecision, GateMessage, GateReason, KnownMemory, ProposedMemory
from app.memory.memories.kinds import MemoryOrigin
from app.memory.memories.memory import PREFIX, Memory, MemorySource, NewMemory
from app.memory.recall.passages import SourceKind
from app.memory.recall.query import MAX_QUERY, RecallMode, RecallQuery
from app.memory.recall.service import Recall
from app.workflows import retention
from app.workflows.runs import submission
from app.workflows.runs.service import Runs
from app.workflows.runs.storage import values
from app.workflows.runs.submission import Submission
from app.workflows.state_machine.states import RunState

_log = log.get(__name__)

#: Messages that were read before and are shown again, as context.
_CONTEXT = 2
#: Known memories that a proposal is compared with: the newest, whether they hold or not, and the most similar.
_RECENT, _SIMILAR = 100, 12
#: Failures after which a part is skipped, and the delay after the first one; each further delay is four times as long.
_ATTEMPTS, _DELAY, _LONGEST_DELAY = 3, timedelta(minutes=1), timedelta(hours=6)
#: Failures for which the part is to blame, or the model.
_UNANSWERABLE = frozenset(
    {
        FailureReason.INVALID_OUTPUT,
        FailureReason.TRUNCATED,
        FailureReason.CONTEXT_EXCEEDED,
        FailureReason.INVALID_REQUEST,
    }
)
_MAX_OUTPUT = 1_048_576


@dataclass(frozen=True, slots=True)
class _Window:
    """The messages of one extraction."""

    #: By their numbers from 1.
    messages: Sequence[StoredMessage]
    #: What the model sees of each.
    shown: Sequence[GateMessage]
    #: They are read up to this one, and so many characters of the one after it.
    through: int
    offset: int


@dataclass(frozen=True, slots=True)
class Extraction:
    """The extraction of all conversations."""

    runs: Runs
    catalog: Callable[[], Catalog]
    settings: MemorySettings

    def advance_all(self) -> int:
        """Write what ended extractions found and begin new ones; returns how many."""
        database = self.runs.database
        with database.work() as work:
            cursors.discover(work, default=self.settings.extract)
            ended = cursors.ended(work)
        for id_, run_id in ended:
            self._guarded(id_, lambda id_=id_, run_id=run_id: self._finish(id_, run_id))  # type: ignore[misc]
        with database.work() as work:
            cursors.remove_refused(work, self.settings.keep_refused)
            begin = cursors.pending(work, self.settings.quiet, self.settings.messages, self.settings.max_parallel)
        for id_ in begin:
            self._guarded(id_, lambda id_=id_: self._begin(id_))  # type: ignore[misc]
        return len(ended) + len(begin)

    def _guarded(self, id_: UUID, act: Callable[[], None]) -> None:
        try:
            act()
        except DatabaseUnreachable:
            raise
        except Exception as error:  # noqa: BLE001 one conversation must not stop the others; it is tried again later
            _log.exception("extraction_failed", conversation_id=str(id_))
            with self.runs.database.work() as work:
                found = cursors.find(work, id_, lock=True)
                if found is not None:
                    nothing = EndedExtraction("failed", None, 0, 0)
                    cursors.retry(work, id_, nothing, shortened(str(error), 500), _delay(found.failures))

    def _begin(self, id_: UUID) -> None:
        with self.runs.database.work() as work:
            reading = cursors.find(work, id_)
            conversation = conversation_store.find(work, id_)
            if reading is None or conversation is None:
                cursors.drop(work, id_)
                return
            enabled, model = cursors.choice_of(work, id_, conversation.namespace, default=self.settings.extract)
            window = _window(work, reading) if enabled else None
            if window is None:
                cursors.pass_over(work, id_)
                return
        said = "\n".join(message.content for message in window.shown)
        known = self._similar(conversation, [said])[: prompt.MAX_KNOWN]
        prepared = submission.prepare(
            self._submission(model or self.settings.model, conversation, window, known),
            self.runs.policy,
            route=self.runs.route,
        )
        with self.runs.transaction() as transaction:
            now = cursors.find(transaction.work, id_, lock=True)
            place = (reading.read_through, reading.read_offset)
            if now is None or now.run_id is not None or (now.read_through, now.read_offset) != place:
                return  # another process was faster
            cursors.begin(transaction.work, id_, prepared.id, window.through, window.offset)
            submission.create(transaction, prepared)
        _log.info("extraction_begun", conversation_id=str(id_), run_id=str(prepared.id), messages=len(window.messages))

    def _submission(
        self, model: str, conversation: StoredConversation, window: _Window, known: Sequence[Memory]
    ) -> Submission:
        entry = self.catalog().find(model)
        is_chat = entry is None or "chat" in entry.use_cases or not entry.use_cases
        numbered = [KnownMemory(number, memory.text) for number, memory in enumerate(known)]
        labels = {} if conversation.namespace == namespaces.DEFAULT else {namespaces.LABEL: conversation.namespace}
        return Submission(
            prompt.definition_of(model, is_chat=is_chat),
            {
                "prompt": prompt.prompt_of(window.shown, numbered),
                "messages": [str(message.id) for message in window.messages],
                "known": [str(memory.id) for memory in known],
            },
            labels=labels,
            deadline=self.settings.timeout,
            retention=timedelta(hours=1),
            id=ids.new_id(),
        )

    def _similar(self, conversation: StoredConversation, given: Sequence[str]) -> list[Memory]:
        """The memories of the conversation's user that hold and have most words in common with texts."""
        recall = Recall(self.runs.database)
        found: dict[UUID, None] = {}
        for one in given:
            query = RecallQuery(
                one[:MAX_QUERY],
                conversation.namespace,
                conversation.user,
                mode=RecallMode.LEXICAL,
                limit=_SIMILAR,
                sources=(SourceKind.MEMORY,),
                neighbours=False,
            )
            for passage in recall.search(query).passages:
                if (parsed := parsed_id(passage.source_id, PREFIX)) is not None:
                    found[parsed] = None
        with self.runs.database.work() as work:
            memories = {memory.id: memory for memory in store.all_of(work, list(found))}
        return [memories[id_] for id_ in found if id_ in memories]

    def _finish(self, id_: UUID, run_id: UUID) -> None:
        with self.runs.database.work() as work:
            run = cursors.run_of(work, run_id)
            conversation = conversation_store.find(work, id_)
            proposed: list[ProposedMemory] | None = None
            if run is not None and run.state == RunState.SUCCEEDED:
                answer = values.outputs(work, run_id, [prompt.STEP], _MAX_OUTPUT)[prompt.STEP]["output"]
                proposed = prompt.proposals(answer)
        similar = (
            [] if not proposed or conversation is None else self._similar(conversation, [one.text for one in proposed])
        )
        with self.runs.transaction() as transaction:
            work = transaction.work
            reading = cursors.find(work, id_, lock=True)
            if reading is None or reading.run_id != run_id:
                return
            conversation = conversation_store.find(work, id_)
            if conversation is None:
                cursors.drop(work, id_)
            elif run is None or proposed is None:
                self._retry(work, reading, run)
            else:
                self._write(work, conversation, run_id, run, proposed, similar)
        try:
            retention.remove_ended_run(self.runs.database, run_id)
        except RowsLocked:
            _log.info("extraction_run_kept", run_id=str(run_id))  # its retention is short

    def _retry(self, work: UnitOfWork, reading: ExtractionState, run: EndedExtraction | None) -> None:
        error = (run.error if run is not None else None) or {"message": "the run was removed", "reason": None}
        message = shortened(str(error.get("message", "the run failed")), 500)
        ended = run or EndedExtraction("failed", None, 0, 0)
        if reading.failures + 1 >= _ATTEMPTS and _reason(work, reading, error) in _UNANSWERABLE:
            cursors.advance(work, reading.conversation_id, ended, skipped=message)
            _log.warning("extraction_skipped", conversation_id=str(reading.conversation_id), error=message)
        else:
            cursors.retry(work, reading.conversation_id, ended, message, _delay(reading.failures))

    def _write(
        self,
        work: UnitOfWork,
        conversation: StoredConversation,
        run_id: UUID,
        run: EndedExtraction,
        proposed: Sequence[ProposedMemory],
        similar: Sequence[Memory],
    ) -> None:
        """Write the proposals of a run that pass the gate."""
        given = values.inputs(work, run_id)
        found = [conversation_store.find_message(work, UUID(one)) for one in given["messages"]]
        messages = {number: one for number, one in enumerate(found, start=1) if one is not None}
        shown = [UUID(one) for one in given["known"]]
        recent = cursors.known(work, conversation.namespace, conversation.user, _RECENT)
        fresh = store.all_of(work, {*shown, *(one.id for one in similar), *(one.id for one in recent)})
        compared = {memory.id: memory for memory in fresh}
        known = [compared.get(one) for one in shown]
        numbers = {memory.id: number for number, memory in enumerate(known) if memory is not None}
        decisions = gate.decide(
            proposed,
            [_gate_message(number, one, one.content) for number, one in messages.items()],
            [
                KnownMemory(numbers.get(memory.id, -2 - at), memory.text, holds=memory.invalid_at is None)
                for at, memory in enumerate(fresh)
            ],
        )
        written, refused = 0, list[dict[str, Any]]()
        for decision in decisions:
            reason, detail = decision.reason, decision.detail
            if reason is None:
                new = _new_memory(decision, conversation, messages, run_id)
                old = None if decision.replaces is None else known[decision.replaces]
                reason, detail = _remember(work, new, conversation.namespace, old)
            if reason is None:
                written += 1
            else:
                same = next(
                    (one for at, one in enumerate(fresh) if decision.same_as == numbers.get(one.id, -2 - at)), None
                )
                refused.append(_refusal(decision, conversation, run_id, reason, detail, same))
        cursors.refuse(work, refused)
        cursors.advance(work, conversation.id, run, proposed=len(decisions), written=written)
        _log.info("extraction_ended", conversation_id=str(conversation.id), written=written, refused=len(refused))


def _window(work: UnitOfWork, reading: ExtractionState) -> _Window | None:
    """The next messages of a conversation, as many as one prompt has room for; None when there are none."""
    room = prompt.WINDOW_CHARACTERS >> min(reading.failures, 3)
    before = conversation_store.read(
        work, reading.conversation_id, end=reading.read_through + 1, limit=_CONTEXT, newest_first=True
    )
    new = conversation_store.read(work, reading.conversation_id, first=reading.read_through + 1, limit=50)
    if not new:
        return None
    messages = [*reversed(before)]
    shown = [
        _gate_message(number, one, one.content[-prompt.CONTEXT_CHARACTERS :]) for number, one in enumerate(messages, 1)
    ]
    through, offset = reading.read_through, 0
    for message in new:
        start = reading.read_offset if message.seq == reading.read_through + 1 else 0
        part = message.content[start : start + room]
        if room <= 0 or (part != message.content[start:] and len(messages) > len(before)):
            break  # it begins the next part
        messages.append(message)
        shown.append(_gate_message(len(messages), message, part))
        room -= len(part)
        if start + len(part) < len(message.content):
            through, offset = message.seq - 1, start + len(part)
            break
        through = message.seq
    return _Window(messages, shown, through, offset)


def _gate_message(number: int, message: StoredMessage, content: str) -> GateMessage:
    return GateMessage(number, message.role.value, content, message.speaker or "")


def _new_memory(
    decision: GateDecision, conversation: StoredConversation, messages: dict[int, StoredMessage], run_id: UUID
) -> NewMemory:
    sources = [
        MemorySource(MemoryOrigin.MESSAGE, messages[number].role.value, conversation.id, messages[number].id)
        for number in decision.messages
    ]
    return NewMemory(
        decision.proposed.text,
        decision.proposed.kind,
        conversation.user,
        conversation.id,
        [*sources, MemorySource(MemoryOrigin.RUN, prompt.WORKFLOW, run_id=run_id)],
        max(messages[number].created_at for number in decision.messages),
        decision.proposed.importance,
        round(decision.covered, 3),
    )


def _remember(work: UnitOfWork, new: NewMemory, namespace: str, old: Memory | None) -> tuple[GateReason | None, str]:
    """Write a memory that passed the gate; returns why it was not written, if so."""
    if old is not None and new.valid_from is not None and new.valid_from < old.valid_from:
        return GateReason.OUTDATED, f"{service.shown(old.id)} holds since a later instant"
    supersedes = None if old is None else service.shown(old.id)
    try:
        done = service.remember_in(work, new, namespace, prompt.WORKFLOW, supersedes=supersedes)
    except (Conflict, InvalidInput, NotFound) as error:
        return GateReason.DUPLICATE, shortened(str(error), 300)
    return (None, "") if done.created else (GateReason.DUPLICATE, f"{service.shown(done.memory.id)} says the same")


def _refusal(
    decision: GateDecision,
    conversation: StoredConversation,
    run_id: UUID,
    reason: GateReason,
    detail: str,
    same: Memory | None,
) -> dict[str, Any]:
    named = detail if same is None else f"{detail}: {service.shown(same.id)}"
    return {
        "namespace": conversation.namespace,
        "user": conversation.user,
        "conversation_id": conversation.id,
        "run_id": run_id,
        "kind": decision.proposed.kind.value,
        "text": shortened(decision.proposed.text, 500),
        "reason": reason.value,
        "detail": shortened(named, 500),
    }


def _reason(work: UnitOfWork, reading: ExtractionState, error: dict[str, Any]) -> str | None:
    """Why the run failed: its step says so."""
    if reading.run_id is None:
        return error.get("reason")
    steps = values.outputs(work, reading.run_id, [prompt.STEP], _MAX_OUTPUT)
    of_step = steps.get(prompt.STEP, {}).get("error") or {}
    return of_step.get("reason") or error.get("reason")


def _delay(failures: int) -> timedelta:
    return min(_DELAY * int(4 ** min(failures, 6)), _LONGEST_DELAY)

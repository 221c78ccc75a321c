"""
The extraction of memories from conversations, in the background.

New messages of a conversation whose memory is on are read by a run of the class `batch`. Its proposals pass the write
gate; those that do are written, with the cursor, in one transaction. So nothing is read twice and nothing is lost when
a process dies in between: the run is then found again. The run is removed when its result is written, because it
holds the texts of messages.

A sentence that the model cannot answer is skipped and counted; after other failures the same messages are read again
later. A conversation that raises is left for later, too, and does not stop the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

from app.access import namespaces
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
from app.memory.compression.texts import sentences
from app.memory.conversations import store as conversation_store
from app.memory.conversations.conversation import StoredConversation
from app.memory.conversations.message import StoredMessage
from app.memory.memories import cursors, gate, prompt, service, store
from app.memory.memories.cursors import EndedExtraction, ExtractionState
from app.memory.memories.gate import GateDecision, GateMessage, GateReason, KnownMemory, ProposedMemory
from app.memory.memories.kinds import MemoryOrigin
from app.memory.memories.memory import PREFIX, Memory, MemorySource, NewMemory
from app.memory.memories.prompt import ExtractionPiece
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
#: The delay after a first failure; each further one is four times as long.
_DELAY, _LONGEST_DELAY = timedelta(minutes=1), timedelta(hours=6)
#: Failures for which the text is to blame, or the model.
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
    #: What the model is asked about.
    pieces: Sequence[ExtractionPiece]


@dataclass(frozen=True, slots=True)
class Extraction:
    """The extraction of all conversations."""

    runs: Runs
    settings: MemorySettings

    def advance_all(self) -> int:
        """Write what ended extractions found and begin new ones; returns how many."""
        database = self.runs.database
        with database.work() as work:
            cursors.discover(work, default=self.settings.extract)
            ended = cursors.ended(work)
        for id_, run_id in ended:
            self._guarded(id_, partial(self._finish, id_, run_id))
        with database.work() as work:
            cursors.remove_refused(work, self.settings.keep_refused)
            begin = cursors.pending(work, self.settings.quiet, self.settings.messages, self.settings.max_parallel)
        for id_ in begin:
            self._guarded(id_, partial(self._begin, id_))
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
                    cursors.retry(work, id_, None, shortened(str(error), 500), _delay(found.failures))

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
        if not window.pieces:
            with self.runs.database.work() as work:
                now = cursors.find(work, id_, lock=True)
                if now is not None and now.run_id is None and _place(now) == _place(reading):
                    cursors.pass_to(work, id_, window.through, window.offset)
            return
        said = "\n".join(piece.text for piece in window.pieces)
        known = [one for one in self._similar(conversation, [said]) if one.invalid_at is None][: prompt.MAX_KNOWN]
        prepared = submission.prepare(
            self._submission(model or self.settings.model, conversation, window, known),
            self.runs.policy,
            route=self.runs.route,
        )
        with self.runs.transaction() as transaction:
            now = cursors.find(transaction.work, id_, lock=True)
            if now is None or now.run_id is not None or _place(now) != _place(reading):
                return  # another process was faster
            cursors.begin(transaction.work, id_, prepared.id, window.through, window.offset)
            submission.create(transaction, prepared)
        _log.info("extraction_begun", conversation_id=str(id_), run_id=str(prepared.id), pieces=len(window.pieces))

    def _submission(
        self,
        model: str,
        conversation: StoredConversation,
        window: _Window,
        known: Sequence[Memory],
    ) -> Submission:
        numbered = [KnownMemory(number, memory.text) for number, memory in enumerate(known)]
        labels = {} if conversation.namespace == namespaces.DEFAULT else {namespaces.LABEL: conversation.namespace}
        return Submission(
            prompt.definition_of(model),
            {
                "examples": prompt.examples(),
                "pieces": [prompt.prompt_of(piece, numbered) for piece in window.pieces],
                "numbers": [piece.message for piece in window.pieces],
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
            proposed: list[ProposedMemory] = []
            failures: list[str] = []
            if run is not None and run.state == RunState.SUCCEEDED:
                answers = values.outputs(work, run_id, [prompt.STEP], _MAX_OUTPUT)[prompt.STEP]["output"]
                proposed = prompt.proposals(answers, values.inputs(work, run_id)["numbers"])
                failures = cursors.failures_of(work, run_id)
        similar: list[Memory] = []
        if proposed and conversation is not None:
            similar = self._similar(conversation, [one.text for one in proposed])
        with self.runs.transaction() as transaction:
            work = transaction.work
            reading = cursors.find(work, id_, lock=True)
            if reading is None or reading.run_id != run_id:
                return
            conversation = conversation_store.find(work, id_)
            if conversation is None:
                cursors.drop(work, id_)
            elif run is None or run.state != RunState.SUCCEEDED or not _UNANSWERABLE.issuperset(failures):
                cursors.retry(work, id_, run, _error(run, failures), _delay(reading.failures))
            else:
                self._write(work, conversation, run_id, run, proposed, similar, skipped=len(failures))
        try:
            retention.remove_ended_run(self.runs.database, run_id)
        except RowsLocked:
            _log.info("extraction_run_kept", run_id=str(run_id))  # its retention is short

    def _write(
        self,
        work: UnitOfWork,
        conversation: StoredConversation,
        run_id: UUID,
        run: EndedExtraction,
        proposed: Sequence[ProposedMemory],
        similar: Sequence[Memory],
        *,
        skipped: int,
    ) -> None:
        """Write the proposals of a run that pass the gate."""
        given = values.inputs(work, run_id)
        said = [UUID(one) for one in given["messages"]]
        found = conversation_store.find_messages(work, said)
        messages = {number: found[one] for number, one in enumerate(said, start=1) if one in found}
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
        cursors.advance(work, conversation.id, run, proposed=len(decisions), written=written, skipped=skipped)
        _log.info("extraction_ended", conversation_id=str(conversation.id), written=written, refused=len(refused))


def _window(work: UnitOfWork, reading: ExtractionState) -> _Window | None:
    """The next messages of a conversation, as many as one prompt has room for; None when there are none."""
    room = prompt.WINDOW_CHARACTERS
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
        part = _head(message.content[start:], room)
        if room <= 0 or (part != message.content[start:] and len(messages) > len(before)):
            break  # it begins the next part
        messages.append(message)
        shown.append(_gate_message(len(messages), message, part))
        room -= len(part)
        if start + len(part) < len(message.content):
            through, offset = message.seq - 1, start + len(part)
            break
        through = message.seq
    pieces = prompt.pieces_of(shown, range(len(before) + 1, len(shown) + 1))
    return _Window(messages, shown, through, offset, pieces)


def _head(text: str, room: int) -> str:
    """The beginning of a text: as many whole sentences as there is room for, or else words."""
    if len(text) <= room:
        return text
    ends = [place.end for place in sentences(text[: room + 1])][:-1]
    return text[: ends[-1] if ends else max(text.rfind(" ", 0, room), 0) or room]


def _place(reading: ExtractionState) -> tuple[int, int]:
    return reading.read_through, reading.read_offset


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


def _error(run: EndedExtraction | None, failures: Sequence[str]) -> str:
    """Why a run has no answers."""
    if run is None:
        return "the run was removed"
    if failures:
        return f"{len(failures)} requests failed: {', '.join(sorted(set(failures)))}"
    return shortened(str((run.error or {}).get("message", f"the run was {run.state}")), 500)


def _delay(failures: int) -> timedelta:
    return min(_DELAY * int(4 ** min(failures, 6)), _LONGEST_DELAY)

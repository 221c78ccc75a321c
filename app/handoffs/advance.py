"""
The job of hand-offs: messages that came are validated, transformed and submitted as runs; messages whose run has
ended are confirmed and scored.

Several control workers share the work, each message is taken by one. A message is submitted under an idempotency key
of its own, so a crash between the submission and its record submits nothing twice. One bad message never stops a pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from app.governance.signals import store as signals
from app.governance.signals.sample import Sample, SignalLabels
from app.handoffs import check, delivery, following, processing, scoring, store, tool_access
from app.handoffs.connectors.workflow_target import WorkflowTarget
from app.handoffs.definition import Handoff
from app.handoffs.mail import answers
from app.handoffs.processing import Processed
from app.handoffs.record import COUNTED, HandoffMessage, HandoffStage, MessageState
from app.handoffs.scoring import MessageScores
from app.handoffs.store import MessageChange
from app.kernel import log
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import ArrieroError, BudgetUsedUp, InvalidInput, NotFound, Problem, StepFailure, Unavailable
from app.workflows import registry
from app.workflows.language.definition import Definition
from app.workflows.runs.service import Runs
from app.workflows.runs.storage import payloads
from app.workflows.runs.submission import Submission

_log = log.get(__name__)

#: Messages of one transaction.
_BATCH = 50
#: How long a worker may take for those; then another one takes them.
_LEASE = timedelta(minutes=1)
#: How often a message is taken before it counts as failed: its worker died, or could not tell why it failed.
MAX_TAKES = 5
#: Most characters of what a target answered that are kept with a failure.
_MAX_REASON = 1_000


@dataclass(slots=True)
class _Known:
    """The definitions of a pass, by namespace, name and version."""

    database: Database
    found: dict[tuple[str, str, int], tuple[Handoff, Definition | None]] = field(default_factory=dict)
    #: Why a hand-off delivers nothing.
    refused: dict[tuple[str, str, int], str] = field(default_factory=dict)

    def get(self, message: HandoffMessage) -> tuple[Handoff, Definition | None]:
        """Return a hand-off and its workflow. Raises NotFound, InvalidInput."""
        key = (message.namespace, message.handoff, message.version)
        if key not in self.found:
            with self.database.work() as work:
                version = store.find_version(work, *key)
            if version is None:
                raise NotFound("hand-off", message.handoff)
            handoff = check.stored(version.document)
            self.found[key] = (handoff, delivery.workflow_of(handoff))
        return self.found[key]

    def refusal(self, message: HandoffMessage, handoff: Handoff) -> str:
        """Return why a hand-off delivers nothing now, or an empty text."""
        key = (message.namespace, message.handoff, message.version)
        if key not in self.refused:
            found = tool_access.problems(self.database, message.namespace, handoff)
            self.refused[key] = str(found[0]) if found else ""
        return self.refused[key]


def advance(runs: Runs, in_time: Callable[[], bool]) -> tuple[int, int]:
    """Take messages and confirm others while there is time. Returns how many of each. Raises Unavailable."""
    known, sent, confirmed = _Known(runs.database), 0, 0
    while in_time():
        with runs.database.work() as work:
            taken = store.take(work, _LEASE, _BATCH)
        for message in taken:
            _guarded(runs, known, message)
        ended = _confirm(runs, known)
        sent, confirmed = sent + len(taken), confirmed + ended
        if not taken and not ended:
            break
    return sent, confirmed


def _guarded(runs: Runs, known: _Known, message: HandoffMessage) -> None:
    """Send a message. What goes wrong with it is recorded with it."""
    try:
        change = _sent(runs, known, message)
    except Unavailable:
        raise
    except ArrieroError as error:
        change = _failed(str(error))
    except Exception:  # noqa: BLE001 one bad message never stops the others; it is taken again, a few times
        _log.exception("handoff_message_not_sent", message_id=str(message.id), handoff=message.handoff)
        if message.takes < MAX_TAKES:
            return
        change = _failed("it could not be processed; the log of the control worker has the reason")
    if change is not None:
        _record(runs.database, message, change)


def _sent(runs: Runs, known: _Known, message: HandoffMessage) -> MessageChange | None:
    """Send a message. Returns what came of it; None when its target can take no more for now."""
    if message.takes > MAX_TAKES:
        return _failed(f"{MAX_TAKES} workers took it, and none came to an end with it")
    handoff, workflow = known.get(message)
    if refused := known.refusal(message, handoff):
        return _failed(refused)
    processed = processing.process(handoff, message.message)
    if not processed.is_valid:
        return _invalid(handoff, processed)
    recipient = handoff.target.recipient(processed.payload)
    if recipient is not None:
        with runs.database.work() as work:
            if store.has_opted_out(work, message.namespace, recipient):
                return MessageChange(MessageState.SKIPPED, HandoffStage.DELIVER, f"{recipient} wants no replies")
    if handoff.rate is not None:
        with runs.database.work() as work:
            if not store.reserve(work, message, handoff.rate.requests, handoff.rate.per):
                return None
    try:
        accepted = runs.submit(_submission(runs.database, handoff, workflow, message, processed))
    except BudgetUsedUp as error:
        _log.info("handoff_message_waits", message_id=str(message.id), reason=str(error))
        return None
    except InvalidInput as error:  # the inputs of a workflow have schemas, too
        problems = error.problems[: processing.MAX_PROBLEMS]
        return _invalid(handoff, Processed(processed.payload, problems, 0, len(processed.payload)))
    detail = f"run {accepted.id}"
    return MessageChange(MessageState.DELIVERING, HandoffStage.TRANSFORM, detail, processed.payload, run_id=accepted.id)


def _submission(
    database: Database, handoff: Handoff, workflow: Definition | None, message: HandoffMessage, processed: Processed
) -> Submission:
    labels = {delivery.HANDOFF_LABEL: message.handoff, delivery.MESSAGE_LABEL: str(message.id)}
    key = f"handoff:{message.id}:{message.sending}"
    if workflow is not None:
        inputs: dict[str, Any] = {"payload": processed.payload, "key": message.key}
        return Submission(workflow, inputs, idempotency_key=key, labels=labels, namespace=message.namespace)
    target = handoff.target
    assert isinstance(target, WorkflowTarget), "other targets have a plan"
    found = registry.get(database, target.workflow, target.version, namespace=message.namespace)
    return Submission(
        found.definition,
        processed.payload,
        version=found.version,
        idempotency_key=key,
        labels=labels,
        newest=target.version is None,
        namespace=message.namespace,
    )


def _confirm(runs: Runs, known: _Known) -> int:
    """Record what came of runs that have ended. Returns how many."""
    try:
        return _confirm_batch(runs, known, _BATCH, [])
    except Unavailable:
        raise
    except Exception:  # noqa: BLE001 one message that cannot be confirmed never holds up the others: they go singly
        _log.exception("handoff_messages_not_confirmed")
    count = 0
    while count < _BATCH:
        tried: list[HandoffMessage] = []
        try:
            if not _confirm_batch(runs, known, 1, tried):
                break
        except Unavailable:
            raise
        except Exception:
            if not tried:
                raise
            message = tried[0]
            _log.exception("handoff_message_not_confirmed", message_id=str(message.id), handoff=message.handoff)
            reason = "its run succeeded, and it could not be confirmed; the log of the control worker has the reason"
            _record(runs.database, message, _failed(reason, HandoffStage.CONFIRM))
        count += 1
    return count


def _confirm_batch(runs: Runs, known: _Known, most: int, tried: list[HandoffMessage]) -> int:
    """Confirm in one transaction; the messages are added to `tried`."""
    with runs.database.work() as work:
        rows = store.ended(work, most)
        for row in rows:
            message = HandoffMessage(**{name: getattr(row, name) for name in HandoffMessage.__dataclass_fields__})
            tried.append(message)
            change = _confirmed(work, known, message, row)
            _write(work, message, change)
            if change.state is MessageState.DELIVERED:
                _answer(work, known, message, row)
    return len(rows)


def _answer(work: UnitOfWork, known: _Known, message: HandoffMessage, row: Any) -> None:
    try:
        handoff, workflow = known.get(message)
    except ArrieroError:  # it was deleted since
        return
    output = _output(work, row)
    answers.add(work, handoff, message, output if workflow is None else output.get("response"))


def _confirmed(work: UnitOfWork, known: _Known, message: HandoffMessage, row: Any) -> MessageChange:
    if row.run_state is None:
        return _failed("its run was removed", HandoffStage.CONFIRM)
    if row.run_state != "succeeded":
        error = row.error or {}
        reason = f"run {message.run_id} {row.run_state}: {error.get('message', 'without a reason')}"
        return _failed(reason[:_MAX_REASON], HandoffStage.CONFIRM)
    payload, output = message.payload or {}, _output(work, row)
    try:
        handoff, workflow = known.get(message)
    except ArrieroError:  # it was deleted since: what was delivered stays delivered
        return MessageChange(MessageState.DELIVERED, HandoffStage.CONFIRM, "the hand-off was deleted")
    try:
        following.pass_on(work, handoff, message, output)
    except (StepFailure, InvalidInput, NotFound) as error:  # a person sees it, and can send the message again
        return _failed(str(error), HandoffStage.CONFIRM)
    read = None if workflow is None or "read" not in workflow.outputs else output.get("read", {})
    scores = MessageScores(
        scoring.accuracy(len(payload), len(payload), payload, read),
        scoring.completeness(handoff.expected, payload),
        scoring.timeliness(row.ended_at - message.received_at, handoff.success.deadline),
    )
    wrong = [] if read is None else [name for name, value in payload.items() if not scoring.agrees(value, read, name)]
    detail = f"read back: {', '.join(wrong[:10])} differ" if wrong else "" if read is None else "read back: it agrees"
    return MessageChange(MessageState.DELIVERED, HandoffStage.CONFIRM, detail, scores=scores)


def _output(work: UnitOfWork, row: Any) -> dict[str, Any]:
    if row.output_sha256 is None:
        return row.output if isinstance(row.output, dict) else {}
    found = json.loads("".join(text for _, text in payloads.get(work, [row.output_sha256])))
    return found if isinstance(found, dict) else {}


def _invalid(handoff: Handoff, processed: Processed) -> MessageChange:
    accuracy = scoring.accuracy(processed.valid_fields, processed.fields, {})
    completeness = scoring.completeness(handoff.expected, processed.payload)
    scores = MessageScores(accuracy, completeness, 0.0)
    problems = processed.problems
    said = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return MessageChange(MessageState.INVALID, HandoffStage.VALIDATE, said, problems=problems, scores=scores)


def _failed(reason: str, stage: HandoffStage = HandoffStage.DELIVER) -> MessageChange:
    problem = Problem("target", reason[:_MAX_REASON])
    return MessageChange(MessageState.FAILED, stage, reason[:_MAX_REASON], problems=(problem,))


def _record(database: Database, message: HandoffMessage, change: MessageChange) -> None:
    with database.work() as work:
        _write(work, message, change)


def _write(work: UnitOfWork, message: HandoffMessage, change: MessageChange) -> None:
    """Record a change and, when the message has ended, whether it is a success."""
    finished = store.change(work, message, change)
    if finished is not None and change.state in COUNTED:
        labels = SignalLabels(namespace=message.namespace)
        signals.write(work, [Sample("handoff_success", COUNTED[change.state], labels, at=finished)])

"""What follows a delivery: messages of other hand-offs of the namespace, in the transaction that confirms it."""

from __future__ import annotations

from typing import Any

from app.handoffs import check, processing, store
from app.handoffs.connectors.connector import InboundMessage
from app.handoffs.connectors.submission import SubmissionSource
from app.handoffs.definition import Handoff
from app.handoffs.record import HandoffMessage
from app.kernel.database import UnitOfWork
from app.kernel.errors import InvalidInput, NotFound, Problem
from app.workflows.expressions import conditions, transforms


def pass_on(work: UnitOfWork, handoff: Handoff, message: HandoffMessage, output: Any) -> None:
    """
    Store the messages that follow. They have the key of this one, so that none is stored twice.

    Raises StepFailure for an expression that fails, NotFound and InvalidInput for a hand-off that cannot take it.
    """
    data = {"message": message.message, "payload": message.payload or {}, "key": message.key, "output": output}
    for i, one in enumerate(handoff.then):
        if one.when is not None and not conditions.evaluate(one.when, data):
            continue
        found = transforms.evaluate(data, cel=one.cel)
        if not isinstance(found, dict):
            problem = Problem(f"then[{i}].cel", f"its value is {type(found).__name__}", "an object")
            raise InvalidInput([problem], "message")
        version = store.find_version(work, message.namespace, one.handoff)
        if version is None:
            raise NotFound("hand-off", one.handoff)
        target = check.stored(version.document)
        if not isinstance(target.source, SubmissionSource):
            problem = Problem(
                f"then[{i}].handoff", f"the source of {one.handoff!r} is {target.source.kind}", "kind: api"
            )
            raise InvalidInput([problem], "message")
        store.receive(work, version, processing.identified(target, InboundMessage(message.key, message.sender, found)))

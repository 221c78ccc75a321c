"""The workflow of a hand-off: what delivers a payload, as a definition of which each message has a run."""

from __future__ import annotations

from typing import Any

from app.handoffs.definition import Handoff
from app.workflows.language import check
from app.workflows.language.definition import Definition
from app.workflows.language.source import SourceDocument

#: The labels of its runs.
HANDOFF_LABEL, MESSAGE_LABEL = "handoff", "handoff_message"


def workflow_of(handoff: Handoff) -> Definition | None:
    """Return the workflow of a hand-off; None when its target is a stored one. Raises InvalidDefinition."""
    document = document_of(handoff)
    return None if document is None else check.check(SourceDocument(document, {}))


def document_of(handoff: Handoff) -> dict[str, Any] | None:
    """Return the workflow as plain data."""
    retry = handoff.retry.model_dump(mode="json", exclude_unset=True)
    plan = handoff.target.plan(retry, handoff.fields)
    if plan is None:
        return None
    return {
        "workflow": f"handoff-{handoff.handoff}"[:100].rstrip("-"),
        "inputs": {"payload": {"type": "object"}, "key": {"type": "string"}},
        "steps": plan.steps,
        "outputs": plan.outputs,
        "priority": "interactive",
    }

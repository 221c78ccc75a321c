"""The execution of `recall` steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.kernel.errors import FailureReason, StepFailure
from app.memory.recall.passages import SourceKind
from app.memory.recall.query import MAX_QUERY, Recalled, RecallMode, RecallQuery, RecallScope
from app.memory.recall.service import Recall
from app.workflows.expressions import conditions, templates
from app.workflows.language.recall import RecallFields


def recall(step: RecallFields, data: Mapping[str, Any], namespace: str, service: Recall) -> Recalled:
    """Return what is found in the namespace of the run. Raises StepFailure."""
    text = templates.render(step.query, data)
    if len(text) > MAX_QUERY:
        message = f"'query' has {len(text)} characters; at most {MAX_QUERY} are accepted"
        raise StepFailure(FailureReason.INVALID_REQUEST, message)
    query = RecallQuery(
        text,
        namespace,
        user=None if step.user is None else templates.render(step.user, data) or None,
        scope=RecallScope(step.scope),
        mode=RecallMode(step.mode),
        limit=step.limit,
        sources=tuple(map(SourceKind, step.sources)),
        conversations=tuple(templates.render(one, data) for one in step.conversations),
        roles=step.roles,
        kinds=step.kinds,
        since=None if step.since is None else conditions.evaluate(step.since, data, result_type="time"),
        until=None if step.until is None else conditions.evaluate(step.until, data, result_type="time"),
        half_life=step.half_life or None,
        neighbours=step.neighbours,
    )
    return service.search(query)

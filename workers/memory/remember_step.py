"""The execution of `remember` steps. A second attempt finds what the first one wrote."""

from __future__ import annotations

from app.kernel.database import Database
from app.kernel.errors import Conflict, FailureReason, InvalidInput, NotFound, StepFailure
from app.memory.memories import service
from app.memory.memories.kinds import MemoryKind, MemoryOrigin
from app.memory.memories.memory import MemorySource, NewMemory
from app.workflows.expressions import templates
from app.workflows.language.remembering import RememberFields
from app.workflows.runs.claims import Claim
from app.workflows.state_machine.outcomes import Success


def remember(step: RememberFields, claim: Claim, database: Database) -> Success:
    """Write the memory of a step. Raises StepFailure."""
    user = "" if step.user is None else templates.render(step.user, claim.data)
    supersedes = "" if step.supersedes is None else templates.render(step.supersedes, claim.data)
    new = NewMemory(
        templates.render(step.text, claim.data),
        MemoryKind(step.memory),
        user or None,
        sources=[MemorySource(MemoryOrigin.RUN, claim.workflow[:200], run_id=claim.run_id)],
        importance=step.importance,
    )
    try:
        done = service.remember(database, new, claim.namespace, claim.workflow, supersedes=supersedes or None)
    except (Conflict, InvalidInput, NotFound) as error:
        raise StepFailure(FailureReason.INVALID_REQUEST, str(error)) from None
    memory = done.memory
    return Success({"id": service.shown(memory.id), "text": memory.text, "kind": memory.kind, "created": done.created})

"""
When a summary is due, and the run that makes it.

It is made in the background before the window is full, so that nobody waits for it. A window gets two tries: one when
it is fairly full, one when it is nearly full. If both fail, the window moves without a summary.
"""

from __future__ import annotations

from functools import lru_cache
from uuid import UUID, uuid5

from app.memory.assembly.plan import AssemblyPlan
from app.workflows.language import definition as definitions
from app.workflows.language.definition import Definition

#: How full a window is at its first and at its second try.
TRIES = (0.6, 0.85)
#: The share of the window's room that the summary leaves out: what the window keeps when it moves to its end.
KEPT = 0.4
#: The least tokens of a summary that is worth its run.
LEAST_TOKENS = 32
#: The name of the workflow and of its step.
WORKFLOW, STEP = "summarize-conversation", "summary"
#: Sizes are rounded, so that few definitions are stored.
_ROUND = 32
_NAMES = UUID("6f1c1d7e-7a3b-5a0e-9c59-3d5b0b6d1f52")


def fill(plan: AssemblyPlan, written: int) -> float:
    """Return how full the window is after a turn with an answer of so many tokens."""
    room = plan.recent_room + plan.known.request_tokens
    return (plan.window.tokens + plan.known.request_tokens + written) / room if room > 0 else 1.0


def due_try(filled: float) -> int | None:
    """Return the number of the try that is due, from 0; None when none is."""
    return max((number for number, share in enumerate(TRIES) if filled >= share), default=None)


def run_id(conversation_id: UUID, revision: int, model: str, first_seq: int, number: int) -> UUID:
    """The id of the run of a try: whoever sees that it is due submits the same run."""
    return uuid5(_NAMES, f"{conversation_id}/{revision}/{model}/{first_seq}/{number}")


def definition_for(plan: AssemblyPlan, model: str) -> Definition | None:
    """Return the workflow that makes the summary for a plan; None when its budget has no room for one."""
    most = plan.budgets.summary // _ROUND * _ROUND
    if most < LEAST_TOKENS:
        return None
    keep = max(int(plan.recent_room * KEPT) // _ROUND * _ROUND, _ROUND)
    return _definition(model, most, keep)


@lru_cache(maxsize=1024)
def _definition(model: str, most: int, keep: int) -> Definition:
    return definitions.from_document(
        {
            "workflow": WORKFLOW,
            "inputs": {"conversation": {"type": "string"}},
            "priority": "batch",
            "steps": [
                {
                    "id": STEP,
                    "kind": "summarize",
                    "model": model,
                    "conversation": "{{ inputs.conversation }}",
                    "max_tokens": most,
                    "keep_tokens": keep,
                    "retry": {"max_attempts": 2},
                }
            ],
        }
    )

"""
Agents: their next items are written and begun.

A worker decides what follows (`workers/tool_loop/`) while it holds the step of the agent, as an attempt of it. Then the
step is delegated to the new items; when the last of them has ended, `maps` dispatches it again.
"""

from __future__ import annotations

from app.kernel.errors import ArrieroError, FailureReason
from app.workflows.language.agent import TURN
from app.workflows.language.steps import AgentStep
from app.workflows.runs import maps
from app.workflows.runs.changes.change import RunChange, queue_of
from app.workflows.runs.claims import Claim
from app.workflows.runs.storage import agent_items, items
from app.workflows.state_machine.outcomes import Continued


def proceed(change: RunChange, claim: Claim, continued: Continued) -> None:
    """Write the next items of an agent and begin them. Values that cannot be stored fail the attempt."""
    definition, step, work = claim.step, change.steps[claim.key], change.transaction.work
    assert isinstance(definition, AgentStep)
    try:
        for item in continued.items:
            models = change.graph.models(claim.key) if item.kind == TURN else ()
            model, queue = models[0] if models else None, queue_of(models)
            agent_items.append(work, step, claim.run_id, item, model, queue, change.transaction.policy.limits)
    except ArrieroError as error:
        change.fail(claim.key, claim.attempt, FailureReason.INVALID_REQUEST, str(error))
        return
    fan = agent_items.counts(work, claim.step_id, continued.time)
    items.write_fan_out(work, claim.step_id, fan)
    change.leave(claim.key, claim.attempt, {"items": fan.total}, delegated=True)
    # Where a cancel was requested meanwhile, the items were stopped at once.
    maps.refill(change, definition, claim.step_id, items.find(work, claim.step_id) or fan)

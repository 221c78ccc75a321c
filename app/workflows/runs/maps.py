"""
Maps: expansion into items, the start of further items when one has ended, and the end of the map.

The items of an agent, which `agents` writes, end in the same way; then the agent is dispatched again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

from app.kernel.errors import ArrieroError, FailureReason, PayloadTooLarge
from app.workflows.language.steps import AgentStep, MapStep
from app.workflows.runs.changes.change import RunChange, open_change, queue_of, stop_items
from app.workflows.runs.changes.effects import PublishItems
from app.workflows.runs.claims import Claim
from app.workflows.runs.storage import items
from app.workflows.state_machine import fan_out
from app.workflows.state_machine.fan_out import FanOut, MapEnding
from app.workflows.state_machine.outcomes import LENGTH, TokenUsage
from app.workflows.state_machine.states import FINAL_RUNS, StepState


def expand(change: RunChange, claim: Claim, values: Sequence[Any]) -> None:
    """Write the items of a map and begin the first ones. Values that cannot be stored fail the attempt."""
    definition, step = claim.work, change.steps[claim.key]
    assert isinstance(definition, MapStep)
    work, models = change.transaction.work, change.graph.models(claim.key)
    kind = {"kind": definition.step.kind, "model": models[0] if models else None, "queue": queue_of(models)}
    try:
        fan = items.expand(work, claim.run_id, step, kind, values, change.transaction.policy.limits)
    except ArrieroError as error:
        change.fail(claim.key, claim.attempt, FailureReason.INVALID_REQUEST, str(error))
        return
    items.write_fan_out(work, claim.step_id, fan)
    change.leave(claim.key, claim.attempt, {"items": len(values)}, delegated=True)
    # Where a cancel was requested meanwhile, the items were stopped at once.
    refill(change, definition, claim.step_id, items.find(work, claim.step_id) or fan)


def write_change(change: RunChange) -> None:
    """Write a change; where it ends an item, begin further items of the map, or end the map."""
    change.write()
    item = change.item
    if item is None:
        return
    (step,) = change.run.steps.values()
    definition, parent_id = change.graph.steps[step.key.partition("[")[0]], item.parent_id
    assert isinstance(definition, MapStep | AgentStep)
    assert parent_id is not None
    usage = change.usage(step.key)
    before = fan_out.used(items.fan_out_of(item), usage.tokens_in, usage.tokens_out)
    if change.run.state not in FINAL_RUNS:
        if usage.tokens_in or usage.tokens_out:
            items.write_fan_out(change.transaction.work, parent_id, before)
        return
    fan = fan_out.item_ended(
        before,
        failed=step.state is StepState.FAILED or (step.state is StepState.CANCELLED and not before.stopping),
        collect=_collects(definition),
        begun=item.state != StepState.PENDING,
        truncated=usage.finish_reason == LENGTH,
    )
    if fan.stopping and not before.stopping:
        items.write_fan_out(change.transaction.work, parent_id, fan)
        fan = stop_items(change.transaction, parent_id) or fan
    refill(change, definition, parent_id, fan)


def refill(change: RunChange, definition: MapStep | AgentStep, parent_id: UUID, fan: FanOut) -> None:
    """Begin the next items, or end the map; an agent goes on then."""
    work = change.transaction.work
    fan, count = fan_out.refill(fan, definition.max_parallel if isinstance(definition, MapStep) else fan.total)
    items.write_fan_out(work, parent_id, fan)
    if count:
        started = items.start(work, parent_id, count)
        if not change.locked.paused:
            change.transaction.effects.append(PublishItems(change.locked.workflow, started))
    ending = fan_out.ended(fan, collect=_collects(definition))
    if ending is None:
        return
    if change.item is None:
        _end(change, definition, fan, ending)
    else:
        whole = open_change(change.transaction, change.locked.id)
        _end(whole, definition, fan, ending)
        whole.write()


def _collects(definition: MapStep | AgentStep) -> bool:
    """Whether the other items go on when one has failed; for an agent the next decision follows from the failure."""
    return isinstance(definition, AgentStep) or definition.on_error == "collect"


def _end(change: RunChange, definition: MapStep | AgentStep, fan: FanOut, ending: MapEnding) -> None:
    key, step = definition.id, change.run.steps[definition.id]
    if step.state not in (StepState.AWAITING, StepState.CANCELLING):
        return
    if isinstance(definition, AgentStep):
        # What its items have used is counted once: with the step.
        used = replace(fan, tokens_in=0, tokens_out=0)
        items.write_fan_out(change.transaction.work, change.steps[key].id, used)
        if ending is not MapEnding.STOPPED:
            change.resume(key, step.attempt, TokenUsage(fan.tokens_in, fan.tokens_out))
            return
    work, map_id, limit = change.transaction.work, change.steps[key].id, change.transaction.policy.limits.one
    output_bytes, usage = items.output_bytes(work, map_id), TokenUsage(fan.tokens_in, fan.tokens_out)
    failures = items.failures(work, map_id, fan)
    match ending:
        case MapEnding.SUCCEEDED if output_bytes > limit and key in change.graph.read_outputs:
            message = str(PayloadTooLarge("the outputs of its items together", output_bytes, limit))
            change.fail(key, step.attempt, FailureReason.INVALID_OUTPUT, message, usage=usage)
        case MapEnding.SUCCEEDED:
            if failures:
                change.note_error(key, {"reason": FailureReason.CHILD_FAILED, "attempt": step.attempt} | failures)
            change.succeed_delegated(key, step.attempt, usage)
        case MapEnding.FAILED:
            message = failures.pop("message")
            change.fail(key, step.attempt, FailureReason.CHILD_FAILED, message, usage=usage, details=failures)
        case MapEnding.STOPPED:
            change.fail(key, step.attempt, FailureReason.CANCELLED, "cancelled on request", usage=usage)

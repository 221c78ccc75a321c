"""
Kinds of steps: how each is done. What comes out is an output and what it took, or a StepFailure.

The data that a step sees are the run's inputs and the outputs of the steps before it, nothing else.
"""

from __future__ import annotations

import json
from typing import Any

from app.inference import prompts
from app.kernel.errors import FailureReason, StepFailure
from app.workflows import expressions
from app.workflows.definition import GenerateStep, JoinStep, NoopStep
from app.workflows.outcomes import Success, Usage
from app.workflows.service import Claim
from workers.engine import Engine
from workers.leases import Holding


def do(claim: Claim, holding: Holding, engine: Engine | None) -> Success:
    """
    The work of a claimed step.

    Raises StepFailure, and CancelledError when `holding` was stopped in the middle.
    """
    match claim.definition.step(claim.key):
        case NoopStep():
            return Success(None)
        case JoinStep(template=None, needs=needs):
            return Success({need: claim.outputs[need] for need in needs})
        case JoinStep(template=str(template)):
            return Success(expressions.render(template, _data(claim)))
        case GenerateStep() as step:
            assert engine is not None, "steps that need a model are sent to pools only"
            return _generate(claim, step, holding, engine)
        case other:
            raise AssertionError(f"no such kind: {other}")


def _generate(claim: Claim, step: GenerateStep, holding: Holding, engine: Engine) -> Success:
    request = prompts.request_of(step, _data(claim), priority=claim.priority, attempt=claim.attempt)
    ticket = engine.generate(request)
    holding.on_stop(ticket.cancel)
    seconds = step.timeout.total_seconds()
    try:
        generated = ticket.result(timeout=seconds)
    except TimeoutError:
        ticket.cancel()
        raise StepFailure(FailureReason.TIMEOUT, f"the model was not done after {seconds:g} s") from None
    usage = Usage(generated.tokens_in, generated.tokens_out, generated.tokens_cached, generated.time_to_first)
    if step.output is None:
        return Success(generated.text, usage)
    return Success(json.loads(generated.text), usage)


def _data(claim: Claim) -> dict[str, Any]:
    steps = {key: {"output": output} for key, output in claim.outputs.items()}
    return {"inputs": dict(claim.inputs), "steps": steps}

"""
The plan of rounds: the workflow of a draft, its verification, and what follows while it fails.

Each round is a generation (two with a critic) and a verification, and starts only if the one before left it open. So
each is a step of a run, with its history, retries and cancellation; a crash costs at most one of them.
All steps exist from the beginning: the planner of the fleet sees the models of later rounds as future demand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from app.workflows.expressions import templates
from app.workflows.language.refine import (
    CritiqueAction,
    EscalateAction,
    PolicyAction,
    RefineAction,
    ResampleAction,
)
from app.workflows.language.verification import CandidateFields, ChainFields, Verifier, VoteVerifier
from workers.refinement import drafting
from workers.refinement.drafting import RenderedDraft

#: What a model is told with the failed checks, and with a critique.
REFINE = "Your answer was checked, and is wrong:"
REWRITE = "Write the corrected answer. Write only the answer, in the same form."
CRITIQUE = (
    "Criticise this answer. List what is wrong or missing in it, one point a line. If nothing is wrong, write: nothing."
)
_CRITIC = "A reviewer says about your answer:"
#: What further samples add to a given seed, for each round.
_SEED_STEP = 1_000


def plan(
    kind: Literal["refine", "ensemble"],
    draft: RenderedDraft,
    verifiers: Sequence[Verifier],
    actions: Sequence[PolicyAction],
    data: Mapping[str, Any],
    *,
    as_json: bool,
    accept: Literal["verified", "critic"],
    token_budget: int | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the workflow of a refinement as a document, and its inputs. Raises StepFailure."""
    rounds = [(i, action) for i, action in enumerate(actions) for _ in range(action.rounds)]
    steps: list[dict[str, Any]] = [draft.step("draft0")]
    vote = next((one for one in verifiers if isinstance(one, VoteVerifier) and isinstance(one.samples, int)), None)
    drawn: list[str] = []
    if vote is not None:
        seed = _seed(draft, len(rounds) + 1)
        steps.append(draft.step("samples", sampling={"temperature": vote.temperature, **seed}, n=vote.samples))
        drawn = ["samples"]
    for number in range(len(rounds) + 1):
        by = [f"draft{number}"]
        chain: dict[str, Any] = {
            "last": number == len(rounds),
            "counts_as": kind,
            "accept": accept,
            "token_budget": token_budget,
        }
        needs = [f"draft{number}", *drawn]
        gate: dict[str, Any] = {}
        action = "draft"
        if number:
            place, policy = rounds[number - 1]
            before = f"verdict{number - 1}"
            gate = {"when": f"steps.{before}.output != null && steps.{before}.output.open"}
            steps += _round(number, place, policy, draft, before)
            action = policy.action
            if isinstance(policy, CritiqueAction):
                by.append(f"critique{number}")
            chain["earlier"] = f"steps.{before}.output"
            needs = [before, *needs, *by[1:]]
        elif drawn:
            by += drawn
        candidate = CandidateFields(
            value=f"steps.draft{number}.output",
            action=action,
            by=tuple(by),
            replaces="always" if accept == "critic" else "higher",
        )
        steps.append(
            drafting.verifying(
                f"verdict{number}",
                [candidate],
                verifiers,
                as_json,
                ChainFields.model_validate({name: value for name, value in chain.items() if value is not None}),
                needs=needs,
                join="all_done",
                **gate,
            )
        )
    last = "verdict0"
    if rounds:
        last = "result"
        verdicts = [f"verdict{number}" for number in range(len(rounds) + 1)]
        cel = "steps.verdict0.output"
        for verdict in verdicts[1:]:
            cel = f"(steps.{verdict}.output != null ? steps.{verdict}.output : {cel})"
        steps.append({"id": "result", "kind": "transform", "needs": verdicts, "join": "all_done", "cel": cel})
    inputs = {
        "data": dict(data),
        "draft": draft.inputs,
        "instructions": [_instruction(action, data) for action in actions],
    }
    document: dict[str, Any] = {
        "workflow": kind,
        "inputs": {name: {} for name in inputs},
        "steps": steps,
        "outputs": drafting.outputs_of(last),
    }
    return document, inputs


def _round(number: int, place: int, action: PolicyAction, draft: RenderedDraft, before: str) -> list[dict[str, Any]]:
    """The generations of a round."""
    gate: dict[str, Any] = {"needs": [before], "when": f"steps.{before}.output.open"}
    key, report = f"draft{number}", f"steps.{before}.output"
    kept = {"role": "assistant", "content": f"{{{{ {report}.text or '(no answer)' }}}}"}
    told = f"{{{{ inputs.instructions[{place}] }}}}"
    found = f"{{% if {report}.feedback %}}\n{{{{ {report}.feedback }}}}{{% endif %}}"
    match action:
        case ResampleAction():
            sampling = {"temperature": action.temperature, **_seed(draft, number)}
            return [draft.step(key, sampling=sampling, **gate)]
        case EscalateAction():
            return [draft.step(key, model=action.model, sampling=_seed(draft, number), **gate)]
        case RefineAction():
            further = [kept, {"role": "user", "content": f"{told}{found}\n{REWRITE}"}]
            return [draft.step(key, model=action.model, sampling=_seed(draft, number), further=further, **gate)]
        case CritiqueAction():
            critic = f"critique{number}"
            asked = draft.step(critic, model=action.model, further=[kept, {"role": "user", "content": told}], **gate)
            for field in ("output", "grammar", "prefill", "stop", "max_tokens", "on_length"):
                asked.pop(field, None)
            asked["max_tokens"] = action.max_tokens
            said = f"{{{{ steps.{critic}.output or '(nothing)' }}}}"
            checked = f"{{% if {report}.feedback %}}\n{REFINE}\n{{{{ {report}.feedback }}}}{{% endif %}}"
            further = [kept, {"role": "user", "content": f"{_CRITIC}\n{said}{checked}\n{REWRITE}"}]
            late: dict[str, Any] = {
                "needs": [before, critic],
                "join": "all_done",
                "when": f"{report} != null && {report}.open",
            }
            return [asked, draft.step(key, sampling=_seed(draft, number), further=further, **late)]


def _instruction(action: PolicyAction, data: Mapping[str, Any]) -> str:
    match action:
        case RefineAction():
            return REFINE if action.instruction is None else templates.render(action.instruction, data)
        case CritiqueAction():
            return CRITIQUE if action.instruction is None else templates.render(action.instruction, data)
        case _:
            return ""


def _seed(draft: RenderedDraft, number: int) -> dict[str, int]:
    """The seed of a later round: with the same one, the same text would be written again."""
    seed = draft.fields.sampling.seed
    return {} if seed is None else {"seed": (seed + _SEED_STEP * number) % 2**32}

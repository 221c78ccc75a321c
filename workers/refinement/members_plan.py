"""
The plan of members: the workflow in which several answer at the same time, and one verification chooses.

The steps of all members are ready at once, so the planner of the fleet sees the demand for all their models in the same
pass, and loads together what fits together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.workflows.expressions import templates
from app.workflows.language.ensemble import EnsembleFields
from app.workflows.language.verification import CandidateFields, ChainFields, VoteFields
from workers.refinement import drafting
from workers.refinement.drafting import RenderedDraft

#: What the one who merges is told after the answers of the experts.
MERGE = "Merge these answers into one that has what is right in each. Write only the answer, in the same form."


def plan(
    step: EnsembleFields, data: Mapping[str, Any], default_model: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the workflow of a vote or of experts as a document, and its inputs. Raises StepFailure."""
    drafts = [
        drafting.rendered(step.draft, data, default_model, f"members[{i}]", system=member.system, prompt=member.prompt)
        for i, member in enumerate(step.members)
    ]
    steps = []
    for i, (draft, member) in enumerate(zip(drafts, step.members, strict=True)):
        several: dict[str, Any] = {"n": member.samples} if member.samples > 1 else {}
        steps.append(draft.step(f"member{i}", model=member.model, sampling=_sampling(step, i), **several))
    candidates = [
        CandidateFields(
            value=f"steps.member{i}.output",
            action=f"member {i + 1}",
            by=(f"member{i}",),
            weight=member.weight,
            many=member.samples > 1,
        )
        for i, member in enumerate(step.members)
    ]
    inputs: dict[str, Any] = {"data": dict(data), "members": [draft.inputs for draft in drafts]}
    needs = [one["id"] for one in steps]
    more: dict[str, Any] = {}
    if step.strategy == "vote":
        vote = step.vote or VoteFields()
        more["vote"] = vote.model_dump(mode="json")
    else:
        merged = drafting.rendered(step.draft, data, default_model, "task")
        inputs |= {"task": merged.inputs, "instruction": _instruction(step, data)}
        steps.append(_merge(step, merged, needs))
        candidates.append(
            CandidateFields(value="steps.merged.output", action="merge", by=("merged",), replaces="not_lower")
        )
        needs = [*needs, "merged"]
    steps.append(
        drafting.verifying(
            "verdict",
            candidates,
            step.verifiers,
            drafting.is_json(step.draft, step.verifiers, step.format),
            ChainFields(counts_as="ensemble"),
            needs=needs,
            join="all_done",
            **more,
        )
    )
    document = {
        "workflow": "ensemble",
        "inputs": {name: {} for name in inputs},
        "steps": steps,
        "outputs": drafting.outputs_of("verdict"),
    }
    return document, inputs


def _merge(step: EnsembleFields, draft: RenderedDraft, members: Sequence[str]) -> dict[str, Any]:
    """The step that merges the answers, as far as there are some."""
    answers = "".join(
        f"{{% if steps.{key}.output is not none %}}\n\nAnswer {i + 1}:\n{{{{ {_text(step, key)} }}}}{{% endif %}}"
        for i, key in enumerate(members)
    )
    content = f"Several experts were asked this.{answers}\n\n{{{{ inputs.instruction }}}}"
    named = step.merge.model if step.merge is not None else None
    return draft.step(
        "merged",
        model=named or step.members[0].model,
        further=[{"role": "user", "content": content}],
        needs=list(members),
        join="all_done",
    )


def _text(step: EnsembleFields, key: str) -> str:
    return f"steps.{key}.output | tojson" if step.draft.output is not None else f"steps.{key}.output"


def _instruction(step: EnsembleFields, data: Mapping[str, Any]) -> str:
    given = step.merge.instruction if step.merge is not None else None
    return MERGE if given is None else templates.render(given, data)


def _sampling(step: EnsembleFields, place: int) -> dict[str, Any]:
    """The sampling of a member: its own, and with a given seed a different one for each."""
    own = step.members[place].sampling
    given = {} if own is None else own.model_dump(mode="json", exclude_unset=True)
    seed = step.draft.sampling.seed
    return given if seed is None or "seed" in given else {**given, "seed": (seed + 1_000 * place) % 2**32}

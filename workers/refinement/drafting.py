"""
Drafting: the steps that write drafts, in the workflow that a `refine` or `ensemble` step calls.

The templates of the step are rendered where their names are known, once; the called workflow gets texts as its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.kernel.errors import FailureReason, StepFailure
from app.workflows.expressions import conditions, templates
from app.workflows.language.refine import DraftFields
from app.workflows.language.verification import CandidateFields, ChainFields, Verifier, VerifyFields, VoteVerifier

#: Fields of a draft that are rendered, or chosen for each round.
_OWN = frozenset({"kind", "system", "prompt", "messages", "prefill", "model", "fallback", "sampling", "chat"})
#: The fields of the report that the step outputs.
REPORT = ("output", "verification", "score", "kept", "why", "rounds", "gain", "tokens", "feedback", "ended_by", "vote")


@dataclass(frozen=True, slots=True)
class RenderedDraft:
    """A draft whose templates are rendered."""

    fields: DraftFields
    #: The model where neither a round nor the draft names one.
    default_model: str | None
    #: The path of its texts in the inputs of the called workflow.
    path: str
    messages: Sequence[Mapping[str, Any]] = ()
    prompt: str | None = None
    prefill: str | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        """The texts, as an input of the called workflow."""
        return {"messages": list(self.messages), "prompt": self.prompt, "prefill": self.prefill}

    def step(
        self,
        key: str,
        *,
        model: str | None = None,
        sampling: Mapping[str, Any] | None = None,
        further: Sequence[Mapping[str, Any]] = (),
        **more: Any,
    ) -> dict[str, Any]:
        """
        Return the generate step that answers the messages, and `further` ones.

        `model` and `sampling` replace those of the draft; `more` are other fields.
        """
        document = self.fields.model_dump(mode="json", by_alias=True, exclude_unset=True)
        step = {name: value for name, value in document.items() if name not in _OWN}
        chosen = model or self.fields.model or self.default_model
        if chosen is None:
            raise StepFailure(
                FailureReason.INVALID_REQUEST, "the draft names no model, and the workflow has no default"
            )
        step |= {"id": key, "kind": "generate", "model": chosen, "allow_failure": True}
        if model is None and "fallback" in document:
            step["fallback"] = document["fallback"]
        if wanted := {**document.get("sampling", {}), **(sampling or {})}:
            step["sampling"] = wanted
        if self.prompt is not None:
            step |= {"chat": False, "prompt": f"{{{{ inputs.{self.path}.prompt }}}}"}
        else:
            step["messages"] = _joined(self._messages(), further)
        if self.prefill is not None:
            step["prefill"] = f"{{{{ inputs.{self.path}.prefill }}}}"
        return step | more

    def _messages(self) -> list[dict[str, Any]]:
        found = []
        for i, message in enumerate(self.messages):
            at = f"inputs.{self.path}.messages[{i}]"
            one = {"role": message["role"]}
            if "content" in message:
                one["content"] = f"{{{{ {at}.content }}}}"
            if "tool_calls" in message:
                one["tool_calls"] = f"{at}.tool_calls"
            found.append(one)
        return found


def _joined(messages: list[dict[str, Any]], further: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All messages. Two of the user in a row become one: many chat templates refuse them."""
    if messages and further and messages[-1]["role"] == further[0]["role"] == "user" and "content" in messages[-1]:
        last = {"role": "user", "content": f"{messages[-1]['content']}\n\n{further[0]['content']}"}
        return [*messages[:-1], last, *map(dict, further[1:])]
    return [*messages, *map(dict, further)]


def rendered(
    draft: DraftFields,
    data: Mapping[str, Any],
    default_model: str | None,
    path: str = "draft",
    *,
    system: str | None = None,
    prompt: str | None = None,
) -> RenderedDraft:
    """Return a draft with its texts; `system` and `prompt` replace its own templates. Raises StepFailure."""
    prefill = None if draft.prefill is None else templates.render(draft.prefill, data)
    system, prompt = system or draft.system, prompt or draft.prompt
    if not draft.chat:
        assert prompt is not None, "a draft without a chat has a prompt"
        return RenderedDraft(draft, default_model, path, (), templates.render(prompt, data), prefill)
    messages: list[dict[str, Any]] = []
    if prompt is not None:
        messages += [{"role": "system", "content": templates.render(system, data)}] if system else []
        messages.append({"role": "user", "content": templates.render(prompt, data)})
    for message in draft.messages:
        one: dict[str, Any] = {"role": message.role}
        if message.content is not None:
            one["content"] = templates.render(message.content, data)
        if message.tool_calls is not None:
            one["tool_calls"] = conditions.evaluate(message.tool_calls, data, result_type="list")
        messages.append(one)
    return RenderedDraft(draft, default_model, path, messages, None, prefill)


def verifying(
    key: str,
    candidates: Sequence[CandidateFields],
    verifiers: Sequence[Verifier],
    as_json: bool,
    chain: ChainFields,
    **more: Any,
) -> dict[str, Any]:
    """Return the verify step of some candidates. The names of its verifiers are those of the calling step."""
    judged = VerifyFields(
        kind="verify",
        candidates=tuple(candidates),
        verifiers=tuple(_drawn(one) for one in verifiers),
        format="json" if as_json else "text",
        data="inputs.data",
        chain=chain,
        retry={"max_attempts": 2},
    )
    document = judged.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return {"id": key, **document, **more}


#: The expression of the samples that a vote compares with.
SAMPLES = "steps.samples.output"


def _drawn(verifier: Verifier) -> Verifier:
    """A verifier of the called workflow: the samples of a vote are drawn by a step of it."""
    if isinstance(verifier, VoteVerifier) and not isinstance(verifier.samples, str):
        return verifier.model_copy(update={"samples": SAMPLES})
    return verifier


def is_json(draft: DraftFields, verifiers: Sequence[Verifier], given: str | None) -> bool:
    """Whether the output is a JSON value."""
    if given is not None:
        return given == "json"
    return draft.output is not None or any(one.kind == "schema" for one in verifiers)


def outputs_of(key: str) -> dict[str, str]:
    """Return the outputs of a called workflow whose step has the report."""
    return {name: f"steps.{key}.output.{name}" for name in REPORT}

"""
The fields of `refine` steps: a draft, its verifiers, and what is done when it fails.

The policy is a list that is worked off in its order; each entry has a bound. Without verifiers nothing is known of a
draft: it is labelled `unverified`, and the only further work that makes sense is a critic's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from app.workflows.expressions.result_type import ResultType
from app.workflows.language.generate_fields import GenerateFields
from app.workflows.language.step_work import DocumentPart, StepWork, Template
from app.workflows.language.verification import (
    MAX_ROUNDS,
    OUTPUT_NAMES,
    OutputFormat,
    Verifier,
    VoteVerifier,
    expressions_of,
)


class DraftFields(GenerateFields):
    """How a draft is written: the fields of a generate step whose output is one text or one value."""

    kind: Literal["generate"] = "generate"

    @model_validator(mode="after")
    def _writes_one_output(self) -> DraftFields:
        if self.has_object:
            raise ValueError("a draft is one text or one value: 'n', 'logprobs' and 'tools' are not accepted here")
        return self


_Rounds = Annotated[int, Field(ge=1, le=8)]
_Model = Annotated[str, Field(min_length=1)]


class RefineAction(DocumentPart):
    """The model sees the best draft with the failed checks, and writes it again."""

    action: Literal["refine"]
    rounds: _Rounds = 1
    #: Another model for it.
    model: _Model | None = None
    #: What it is told before the failed checks.
    instruction: Template | None = None


class ResampleAction(DocumentPart):
    """The prompt is answered again, at another temperature."""

    action: Literal["resample"]
    rounds: _Rounds = 1
    temperature: float = Field(default=0.8, gt=0, le=5)


class EscalateAction(DocumentPart):
    """Another model answers the prompt."""

    action: Literal["escalate"]
    rounds: _Rounds = 1
    model: _Model


class CritiqueAction(DocumentPart):
    """A model criticises the best draft, and the model of the draft writes it again with that."""

    action: Literal["critique"]
    rounds: _Rounds = 1
    #: The critic; by default the model of the draft.
    model: _Model | None = None
    #: What the critic is asked.
    instruction: Template | None = None
    #: Most tokens of the critique.
    max_tokens: int = Field(default=256, ge=1, le=100_000)


PolicyAction = Annotated[RefineAction | ResampleAction | EscalateAction | CritiqueAction, Field(discriminator="action")]
#: What is done when nothing else is said.
DEFAULT_POLICY: tuple[PolicyAction, ...] = (RefineAction(action="refine"), ResampleAction(action="resample", rounds=2))


class RefineFields(StepWork):
    """Writes a draft, verifies it, and mends it. Its output has the kept `output` and the whole story."""

    kind: Literal["refine"]
    draft: DraftFields
    verifiers: tuple[Verifier, ...] = Field(default=(), max_length=MAX_ROUNDS)
    #: Tried in this order until a draft passes.
    policy: tuple[PolicyAction, ...] | None = Field(default=None, max_length=MAX_ROUNDS)
    #: `verified`: a draft is replaced only if its score rises. `critic`: the last rewrite is kept, and verifiers only
    #: measure what that did.
    accept: Literal["verified", "critic"] = "verified"
    #: The form of the output; by default `json` if the draft has a schema or a verifier checks one.
    format: OutputFormat | None = None
    #: No further round begins after this number of tokens, read and written.
    token_budget: int | None = Field(default=None, ge=1, le=100_000_000)

    @property
    def actions(self) -> tuple[PolicyAction, ...]:
        """The policy, with its default."""
        if self.policy is None:
            return DEFAULT_POLICY if self.verifiers else ()
        return self.policy

    @model_validator(mode="after")
    def _is_consistent(self) -> RefineFields:
        rounds = sum(action.rounds for action in self.actions)
        if rounds > MAX_ROUNDS:
            raise ValueError(f"'policy' has {rounds} rounds; at most {MAX_ROUNDS} are accepted")
        kinds = {action.action for action in self.actions}
        if self.accept == "critic" and kinds - {"critique"}:
            raise ValueError("'accept: critic' keeps what was written last: 'policy' can have 'critique' only")
        if not self.verifiers and kinds - {"critique"}:
            raise ValueError(
                "without 'verifiers' nothing says whether a draft is wrong: 'policy' can have 'critique' only, with "
                "'accept: critic'"
            )
        if not self.verifiers and kinds and self.accept != "critic":
            raise ValueError("a critique without 'verifiers' needs 'accept: critic': its rewrite is kept unverified")
        if not self.draft.chat and kinds & {"refine", "critique"}:
            raise ValueError("'refine' and 'critique' need the chat template: remove 'chat: false', or use 'resample'")
        if sum(isinstance(one, VoteVerifier) for one in self.verifiers) > 1:
            raise ValueError("at most one verifier can be a vote")
        return self

    def own_names(self) -> tuple[str, ...]:
        return OUTPUT_NAMES

    def drafts(self) -> Iterator[tuple[str, GenerateFields]]:
        """Yield the texts that it writes, with their paths."""
        yield "draft", self.draft

    def models(self) -> Iterator[tuple[str, str]]:
        """Yield the models that it names beside those of its drafts, with their paths."""
        for i, action in enumerate(self.actions):
            named = None if isinstance(action, ResampleAction) else action.model
            if named is not None:
                yield f"policy[{i}].model", named

    def templates(self) -> Iterator[tuple[str, str]]:
        yield from ((f"draft.{place}", template) for place, template in self.draft.templates())
        for i, action in enumerate(self.actions):
            if isinstance(action, RefineAction | CritiqueAction) and action.instruction is not None:
                yield f"policy[{i}].instruction", action.instruction

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        yield from ((f"draft.{place}", text, result) for place, text, result in self.draft.expressions())
        yield from expressions_of(self.verifiers)

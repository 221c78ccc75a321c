"""
The fields of `ensemble` steps: several models, or one with several prompts, work on one output.

`cascade` asks them one after the other until the verifiers pass, `vote` keeps what most of them answer, `review` lets
the second criticise the first, and `experts` lets each answer and one merge the answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from app.workflows.expressions.result_type import ResultType
from app.workflows.language.generate_fields import GenerateFields, SamplingFields
from app.workflows.language.refine import DraftFields
from app.workflows.language.step_work import DocumentPart, StepWork, Template
from app.workflows.language.verification import (
    MAX_MEMBERS,
    MAX_ROUNDS,
    OUTPUT_NAMES,
    OutputFormat,
    Verifier,
    VoteFields,
    VoteVerifier,
    Weight,
    expressions_of,
)


class MemberFields(DocumentPart):
    """One that answers. What it does not set is that of `draft`."""

    model: str | None = Field(default=None, min_length=1)
    system: Template | None = None
    prompt: Template | None = None
    sampling: SamplingFields | None = None
    #: With `vote`: how many answers it gives, and how much each counts.
    samples: int = Field(default=1, ge=1, le=16)
    weight: Weight = 1.0


class MergeFields(DocumentPart):
    """How the answers of experts become one."""

    #: By default the first member's.
    model: str | None = Field(default=None, min_length=1)
    instruction: Template | None = None


class EnsembleFields(StepWork):
    """Lets several models work on one output. Its output is that of a `refine` step."""

    kind: Literal["ensemble"]
    strategy: Literal["cascade", "vote", "review", "experts"]
    draft: DraftFields
    members: tuple[MemberFields, ...] = Field(min_length=1, max_length=MAX_MEMBERS)
    verifiers: tuple[Verifier, ...] = Field(default=(), max_length=MAX_ROUNDS)
    #: With `strategy: vote`.
    vote: VoteFields | None = None
    #: With `strategy: experts`.
    merge: MergeFields | None = None
    #: With `strategy: review`: how often the draft is criticised, and what the critic is asked.
    rounds: int = Field(default=1, ge=1, le=8)
    instruction: Template | None = None
    format: OutputFormat | None = None
    token_budget: int | None = Field(default=None, ge=1, le=100_000_000)

    @model_validator(mode="after")
    def _is_consistent(self) -> EnsembleFields:
        strategy, names = self.strategy, self.model_fields_set
        for field, of in (("vote", "vote"), ("merge", "experts"), ("rounds", "review"), ("instruction", "review")):
            if field in names and strategy != of:
                raise ValueError(f"'{field}' can be used with 'strategy: {of}' only")
        if strategy in ("cascade", "review") and len(self.members) < 2:
            raise ValueError(f"'strategy: {strategy}' needs at least two members")
        if strategy == "review" and len(self.members) > 2:
            raise ValueError("'strategy: review' has two members: the first writes, the second criticises")
        if strategy == "cascade" and not self.verifiers:
            raise ValueError("'strategy: cascade' needs 'verifiers': they say when the next member is asked")
        if strategy == "experts" and len(self.members) < 2:
            raise ValueError("'strategy: experts' needs at least two members")
        answers = sum(member.samples for member in self.members)
        if strategy == "vote" and not 2 <= answers <= 64:
            raise ValueError(f"the members give {answers} answers together; a vote needs 2 to 64")
        for i, member in enumerate(self.members):
            if strategy != "vote" and {"samples", "weight"} & member.model_fields_set:
                raise ValueError(f"'samples' and 'weight' of members[{i}] can be used with 'strategy: vote' only")
            if (member.prompt or member.system) and self.draft.messages:
                raise ValueError(f"'prompt' and 'system' of members[{i}] need a 'draft' with 'prompt'")
            if member.system and not self.draft.chat:
                raise ValueError(f"'system' of members[{i}] needs the chat template: remove 'chat: false'")
            if strategy in ("cascade", "review") and (member.prompt or member.system or member.sampling):
                raise ValueError(f"with 'strategy: {strategy}', members[{i}] can have a 'model' only")
        if strategy in ("review", "experts") and not self.draft.chat:
            raise ValueError(f"'strategy: {strategy}' needs the chat template: remove 'chat: false'")
        if any(isinstance(one, VoteVerifier) and not isinstance(one.samples, str) for one in self.verifiers):
            raise ValueError("a vote of samples is a verifier of 'refine'; use 'strategy: vote'")
        return self

    def own_names(self) -> tuple[str, ...]:
        return OUTPUT_NAMES

    def drafts(self) -> Iterator[tuple[str, GenerateFields]]:
        """Yield the texts that it writes, with their paths."""
        if self.draft.model is None and self.members[0].model is not None:
            yield "draft", self.draft.model_copy(update={"model": self.members[0].model})
        else:
            yield "draft", self.draft

    def models(self) -> Iterator[tuple[str, str]]:
        """Yield the models that it names beside that of its draft, with their paths."""
        for i, member in enumerate(self.members):
            if member.model is not None:
                yield f"members[{i}].model", member.model
        if self.merge is not None and self.merge.model is not None:
            yield "merge.model", self.merge.model

    def templates(self) -> Iterator[tuple[str, str]]:
        yield from ((f"draft.{place}", template) for place, template in self.draft.templates())
        for i, member in enumerate(self.members):
            for place, template in (("system", member.system), ("prompt", member.prompt)):
                if template is not None:
                    yield f"members[{i}].{place}", template
        if self.merge is not None and self.merge.instruction is not None:
            yield "merge.instruction", self.merge.instruction
        if self.instruction is not None:
            yield "instruction", self.instruction

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        yield from ((f"draft.{place}", text, result) for place, text, result in self.draft.expressions())
        yield from expressions_of(self.verifiers)

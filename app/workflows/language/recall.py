"""The fields of `recall` steps, and of the steps that make vectors for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from app.kernel.units.durations import Duration
from app.workflows.expressions.result_type import ResultType
from app.workflows.language.step_work import Expression, Fallback, StepWork, Template

#: Values of a filter.
_Values = Annotated[tuple[Annotated[str, Field(min_length=1, max_length=200)], ...], Field(max_length=100)]


class RecallFields(StepWork):
    """
    Finds what was said: passages of messages, memories, blocks and documents, by words and by meaning.

    Its output has the `passages`, the best first, and how they were found (`lexical`, `dense`).
    """

    kind: Literal["recall"]
    query: Template
    #: Whose passages are searched; without a user, those that belong to the namespace alone.
    user: Template | None = None
    #: Those of the user, those and the namespace's, or those of all users.
    scope: Literal["own", "shared", "all"] = "own"
    mode: Literal["hybrid", "lexical", "dense"] = "hybrid"
    limit: int = Field(default=10, ge=1, le=200)
    sources: tuple[Literal["message", "memory", "block", "document"], ...] = ()
    #: Templates with the ids of conversations.
    conversations: Annotated[tuple[Template, ...], Field(max_length=100)] = ()
    roles: _Values = ()
    #: Kinds of memories.
    kinds: _Values = ()
    #: Expressions that return an instant: passages from then on, and before then.
    since: Expression | None = None
    until: Expression | None = None
    #: The age at which a score has lost half of its value.
    half_life: Duration | None = None
    #: Whether passages beside a good one gain from it.
    neighbours: bool = True

    def templates(self) -> Iterator[tuple[str, str]]:
        yield "query", self.query
        if self.user is not None:
            yield "user", self.user
        yield from ((f"conversations[{number}]", text) for number, text in enumerate(self.conversations))

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        if self.since is not None:
            yield "since", self.since, "time"
        if self.until is not None:
            yield "until", self.until, "time"


class EmbedPassagesFields(StepWork):
    """
    Makes vectors of passages that have none, for recall. Its output has the number of `passages`.

    Such steps are submitted by the job of recall. They name no texts: the pool reads them where they are stored.
    """

    kind: Literal["embed_passages"]
    model: str | None = Field(default=None, min_length=1)
    fallback: Fallback | None = None
    #: Most passages of the step.
    most: int = Field(default=2_000, ge=1, le=100_000)

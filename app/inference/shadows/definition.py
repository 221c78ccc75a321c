"""
The definition of a shadow: whose work is done again, by which candidate, how much of it, and how both are compared.

Nothing here reads a clock or a database.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, ValidationError

from app.inference.splits import definition as splits
from app.inference.splits.definition import SplitCandidate, SplitName, TargetText
from app.kernel.errors import InvalidInput, Problem

#: The name of the candidate in reports.
CANDIDATE = "candidate"


class _ShadowPart(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CompareOptions(_ShadowPart):
    """How the two answers of a pair are compared, beyond what is counted anyway."""

    #: An embedding model: how near the two texts are.
    similarity: TargetText | None = None
    #: A model that says which text is better. It is asked twice, with the texts in both orders.
    judge: TargetText | None = None
    #: The part of the pairs that is judged.
    judge_share: Annotated[StrictFloat | StrictInt, Field(gt=0, le=1)] = 1.0
    #: What the judge looks for.
    criteria: Annotated[str, Field(min_length=1, max_length=2_000)] = (
        "It is right, helps the user, and is no longer than needed."
    )


class ShadowDefinition(_ShadowPart):
    """A shadow of the calls of a model, or of the runs of a workflow."""

    shadow: SplitName
    description: Annotated[str, Field(max_length=1_000, pattern=r"^[^\x00]*$")] = ""
    model: TargetText | None = None
    workflow: TargetText | None = None
    #: Where it holds; without any, everywhere.
    namespaces: tuple[TargetText, ...] = Field(default=(), max_length=100)
    #: The part of the calls or runs that is done again.
    share: Annotated[StrictFloat | StrictInt, Field(gt=0, le=1)] = 0.1
    #: What differs, as the candidate of a split has it, without a name.
    candidate: Mapping[str, Any]
    compare: CompareOptions = CompareOptions()
    #: Most runs of the candidate that wait or run at a time; what comes then is left out.
    max_open: Annotated[StrictInt, Field(ge=1, le=10_000)] = 100
    #: It ends after so many pairs; None: when it is stopped.
    pairs: Annotated[StrictInt, Field(ge=1, le=1_000_000)] | None = None
    #: The smallest difference that matters, of rates, scores and verdicts absolute, of times and lengths relative.
    effect: Annotated[float, Field(gt=0.0005, le=1)] = 0.05
    #: The probability of a wrong verdict, however often one looks.
    alpha: Annotated[float, Field(ge=0.0001, le=0.2)] = 0.05

    @property
    def tried(self) -> SplitCandidate:
        """The candidate."""
        return SplitCandidate.model_validate({**self.candidate, "name": CANDIDATE})


def parse(document: Any) -> ShadowDefinition:
    """Return the shadow of a document. Raises InvalidInput with every problem."""
    try:
        found = ShadowDefinition.model_validate(document)
        found.tried  # noqa: B018 it validates
    except ValidationError as error:
        raise InvalidInput(splits.problems_of(error, "shadow"), "shadow") from None
    # A split with this candidate must be valid: the same fields mean the same.
    as_split = {
        "split": found.shadow,
        "candidates": [{**found.candidate, "name": CANDIDATE}],
        "namespaces": list(found.namespaces),
        **({"model": found.model} if found.model is not None else {}),
        **({"workflow": found.workflow} if found.workflow is not None else {}),
    }
    try:
        splits.parse(as_split)
    except InvalidInput as error:
        problems = [
            Problem(one.where.replace("candidates.0", CANDIDATE), one.message, one.accepted) for one in error.problems
        ]
        raise InvalidInput(problems, "shadow") from None
    if found.workflow is not None and found.tried.models:
        message = "a shadow of runs tries a version; store one with these models"
        raise InvalidInput([Problem("candidate.models", message, "version")], "shadow")
    return found

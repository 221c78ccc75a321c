"""
The fields of `verify` steps, and the verifiers that `refine` and `ensemble` steps share.

A verifier returns checks, each passed or failed. The score of an output is the weighted share of passed checks: of each
verifier by its own weights, of all by those of the verifiers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from app.kernel.units.durations import Duration
from app.workflows.expressions.result_type import ResultType
from app.workflows.language.step_work import ID, DocumentPart, Expression, StepWork

#: Names of expressions of verifiers, beside those of the run: the checked value, and its text.
OUTPUT_NAMES = ("output", "text")
#: Most rounds of one refinement, and most members of one ensemble.
MAX_ROUNDS, MAX_MEMBERS = 16, 8

Weight = Annotated[float, Field(gt=0, le=1_000)]
_Name = Annotated[str, Field(min_length=1, max_length=100)]


class _VerifierFields(DocumentPart):
    """What all verifiers have."""

    #: How much it counts beside the other verifiers.
    weight: Weight = 1.0

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        """Yield its expressions, as steps do."""
        return iter(())


class SchemaVerifier(_VerifierFields):
    """Checks the value against a JSON Schema."""

    kind: Literal["schema"]
    schema_: Any = Field(alias="schema")


class NamedCheck(DocumentPart):
    """A condition that a right output fulfils."""

    name: _Name
    #: A condition over `output`, `text` and the names of the step.
    that: Expression
    weight: Weight = 1.0
    #: What a model is told when the check fails.
    message: str = Field(default="", max_length=1_000)


class ChecksVerifier(_VerifierFields):
    """Checks conditions, in CEL."""

    kind: Literal["checks"]
    checks: tuple[NamedCheck, ...] = Field(min_length=1, max_length=64)

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        for i, check in enumerate(self.checks):
            yield f"checks[{i}].that", check.that, "bool"


class CodeTest(DocumentPart):
    """A test of code: statements that raise when it is wrong."""

    name: _Name
    code: str = Field(min_length=1, max_length=20_000)
    weight: Weight = 1.0


class CodeVerifier(_VerifierFields):
    """Runs the Python code of the output with tests, in a confined process without network."""

    kind: Literal["code"]
    language: Literal["python"] = "python"
    #: The tests, or an expression that returns a list of objects with `name` and `code`.
    tests: Annotated[tuple[CodeTest, ...], Field(min_length=1, max_length=64)] | Expression
    #: Time limit of all tests together, in real time and of the processor.
    timeout: Duration = Field(default="5s", validate_default=True)
    #: Most mebibytes of memory.
    memory_mb: int = Field(default=256, ge=64, le=2_048)

    @model_validator(mode="after")
    def _is_bounded(self) -> CodeVerifier:
        if not 0 < self.timeout.total_seconds() <= 60:
            raise ValueError("'timeout' of a code verifier is above 0 and at most 60s")
        return self

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        if isinstance(self.tests, str):
            yield "tests", self.tests, "list"


GroundedPart = Literal["values", "numbers", "names", "quotes", "sentences"]


class GroundingVerifier(_VerifierFields):
    """Checks that what the output says occurs in sources."""

    kind: Literal["grounding"]
    #: An expression that returns a text or a list of texts.
    sources: Expression
    #: What must occur. By default `values` of a JSON value; `numbers`, `names` and `quotes` of a text.
    what: tuple[GroundedPart, ...] | None = Field(default=None, min_length=1, max_length=5)
    #: Fields of a JSON value that are checked, and those that are not: `total`, `customer.name`.
    fields: tuple[_Name, ...] = Field(default=(), max_length=100)
    ignore: tuple[_Name, ...] = Field(default=(), max_length=100)
    #: Least share of the words of a sentence that one part of the sources must have.
    support: float = Field(default=0.6, gt=0, le=1)

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        yield "sources", self.sources, "any"


class VoteVerifier(_VerifierFields):
    """Checks that other samples of the same prompt agree with the output (self-consistency)."""

    kind: Literal["vote"]
    #: How many samples are drawn, once for all drafts; in a `verify` step, an expression that returns a list of them.
    samples: Annotated[int, Field(ge=2, le=16)] | Expression = 5
    temperature: float = Field(default=0.8, gt=0, le=5)
    #: Fields that are compared; by default the whole output.
    fields: tuple[_Name, ...] = Field(default=(), max_length=100)
    #: Least share of the samples that agree.
    agree: float = Field(default=0.5, gt=0, le=1)

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        if isinstance(self.samples, str):
            yield "samples", self.samples, "any"


Verifier = Annotated[
    SchemaVerifier | ChecksVerifier | CodeVerifier | GroundingVerifier | VoteVerifier, Field(discriminator="kind")
]
#: The form of the checked value: a text, or JSON that is parsed when it comes as a text.
OutputFormat = Literal["text", "json"]


def expressions_of(verifiers: tuple[Verifier, ...]) -> Iterator[tuple[str, str, ResultType]]:
    """Yield the expressions of verifiers, with their paths in the step."""
    for i, verifier in enumerate(verifiers):
        yield from ((f"verifiers[{i}].{place}", text, result) for place, text, result in verifier.expressions())


class VoteFields(DocumentPart):
    """The most frequent of several outputs is kept."""

    #: Fields that are compared; by default the whole output.
    fields: tuple[_Name, ...] = Field(default=(), max_length=100)
    #: Least share of the votes of what is kept.
    agree: float = Field(default=0.5, gt=0, le=1)


class CandidateFields(DocumentPart):
    """One of several values, of which the best is kept."""

    #: An expression that returns the value.
    value: Expression
    #: The value is the object of a generate step with `n` above 1: each of its `choices` is a candidate.
    many: bool = False
    #: What the report calls the way in which it was made.
    action: _Name = "draft"
    #: The steps that made it: the first wrote it; the tokens of all are counted.
    by: tuple[Annotated[str, Field(pattern=ID)], ...] = Field(default=(), max_length=4)
    #: The score with which it replaces an earlier candidate: above that of it, or not below it.
    replaces: Literal["higher", "not_lower", "always"] = "higher"
    #: How much its vote counts.
    weight: Weight = 1.0


class ChainFields(DocumentPart):
    """The place of a `verify` step in a chain of rounds."""

    #: An expression that returns the output of the round before.
    earlier: Expression | None = None
    #: Whether a further round may follow, if this one does not pass.
    last: bool = True
    #: What the counters call the whole.
    counts_as: Literal["refine", "ensemble", "verify"] = "verify"
    #: Who decides what is kept: the verifiers, or the critic; then verifiers measure only.
    accept: Literal["verified", "critic"] = "verified"
    #: No further round begins after this number of tokens.
    token_budget: int | None = Field(default=None, ge=1, le=100_000_000)


class VerifyFields(StepWork):
    """Checks an output. Its own output has the score, and each check with what it found."""

    kind: Literal["verify"]
    #: An expression that returns the output to check.
    value: Expression | None = None
    #: Several values instead, of which one is kept.
    candidates: tuple[CandidateFields, ...] = Field(default=(), max_length=MAX_MEMBERS + 1)
    #: Keeps the most frequent of the candidates with the highest score.
    vote: VoteFields | None = None
    verifiers: tuple[Verifier, ...] = Field(default=(), max_length=MAX_ROUNDS)
    #: `json` parses a text; one that is no JSON fails a check.
    format: OutputFormat | None = None
    #: An expression that returns the names for the verifiers' expressions; by default those of the step.
    data: Expression | None = None
    chain: ChainFields | None = None

    @model_validator(mode="after")
    def _has_values(self) -> VerifyFields:
        if (self.value is None) == (not self.candidates):
            raise ValueError("a verify step needs either 'value' or 'candidates'")
        for i, verifier in enumerate(self.verifiers):
            if isinstance(verifier, VoteVerifier) and not isinstance(verifier.samples, str):
                raise ValueError(  # noqa: TRY004 pydantic makes it an error of the document
                    f"'verifiers[{i}].samples' of a verify step is an expression: it draws no samples"
                )
        if not self.verifiers and self.chain is None and self.vote is None:
            raise ValueError("a verify step needs 'verifiers'")
        return self

    def own_names(self) -> tuple[str, ...]:
        return OUTPUT_NAMES

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        if self.value is not None:
            yield "value", self.value, "any"
        yield from ((f"candidates[{i}].value", one.value, "any") for i, one in enumerate(self.candidates))
        if self.data is not None:
            yield "data", self.data, "any"
        if self.chain is not None and self.chain.earlier is not None:
            yield "chain.earlier", self.chain.earlier, "any"
        if self.data is None:
            yield from expressions_of(self.verifiers)
            return
        # Samples are always those of a step of this workflow.
        for i, verifier in enumerate(self.verifiers):
            if isinstance(verifier, VoteVerifier):
                yield from ((f"verifiers[{i}].{at}", text, kind) for at, text, kind in verifier.expressions())

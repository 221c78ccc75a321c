"""The fields of `compress` steps, which `POST /v1/compress` shares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from app.kernel.security import regex
from app.workflows.expressions.result_type import ResultType
from app.workflows.language.step_work import DocumentPart, Expression, StepWork, Template

#: Methods that people know and that are refused, each with the reason.
_REFUSED = {
    "surprisal": "'surprisal' is not offered: the engines give no log-probabilities of a prompt; 'prune' uses the "
    "frequencies of words instead",
    "llmlingua2": "'llmlingua2' is not available: its classifier needs weights and PyTorch, which are no part of this "
    "installation; 'prune' needs neither",
}


def _offered(value: Any) -> Any:
    if isinstance(value, str) and value in _REFUSED:
        raise ValueError(f"{_REFUSED[value]}; accepted are structure, deduplicate, select and prune")
    return value


def _pattern(value: Any) -> Any:
    if not isinstance(value, str):
        return value  # refused afterwards, by its type
    try:
        regex.compiled(value)
    except regex.PatternRefused as error:
        raise ValueError(f"{error}; accepted is {regex.ACCEPTED}") from None
    return value


#: A method of compression.
CompressionMethod = Annotated[Literal["structure", "deduplicate", "select", "prune"], BeforeValidator(_offered)]


class ProtectFields(DocumentPart):
    """What must stay: sentences in which one of these occurs are kept, and it is never cut."""

    #: Regular expressions for RE2, matched within a line.
    patterns: tuple[
        Annotated[str, Field(min_length=1, max_length=regex.MAX_LENGTH), BeforeValidator(_pattern)], ...
    ] = Field(default=(), max_length=32)
    #: Texts, as they are written.
    texts: tuple[Annotated[str, Field(min_length=1, max_length=1_000)], ...] = Field(default=(), max_length=32)


class SummaryFields(DocumentPart):
    """A summary, written by a model, in place of what is left out."""

    model: str = Field(min_length=1)
    #: Most tokens of the summary. They are a part of the target.
    max_tokens: int = Field(default=200, ge=20, le=4_000)


class CompressionFields(DocumentPart):
    """The target of a compression, and what may be done for it."""

    #: The model whose tokenizer counts. It is not loaded.
    model: str = Field(min_length=1)
    #: Tokens before for each token after: 2 halves the text. Either this or `max_tokens`.
    target_ratio: float | None = Field(default=None, ge=1, le=100)
    max_tokens: int | None = Field(default=None, ge=1, le=10_000_000)
    methods: tuple[CompressionMethod, ...] = Field(
        default=("structure", "deduplicate", "select", "prune"), min_length=1, max_length=4
    )
    protect: ProtectFields = ProtectFields()
    #: The last messages, which are kept as they are.
    keep_recent: int = Field(default=1, ge=0, le=1_000)
    #: A model for embeddings: with a query, sentences are then chosen by meaning, too.
    embedding_model: str | None = Field(default=None, min_length=1)
    summary: SummaryFields | None = None

    @model_validator(mode="after")
    def _has_one_target(self) -> CompressionFields:
        if (self.target_ratio is None) == (self.max_tokens is None):
            raise ValueError("a compression needs either 'target_ratio' or 'max_tokens'")
        return self


class CompressFields(StepWork, CompressionFields):
    """Compresses a text or messages. Its output has the `text` or the `messages`, and what was done."""

    kind: Literal["compress"]
    #: An expression that returns a text, or a list of messages: objects with `role` and `content`.
    input: Expression
    #: What the result is for: sentences that have to do with it are kept first.
    query: Template | None = None

    def templates(self) -> Iterator[tuple[str, str]]:
        if self.query is not None:
            yield "query", self.query

    def expressions(self) -> Iterator[tuple[str, str, ResultType]]:
        yield "input", self.input, "any"

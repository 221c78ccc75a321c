"""The fields of `summarize` steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from app.workflows.language.step_work import Fallback, StepWork, Template


class SummarizeFields(StepWork):
    """
    Summarises a conversation up to a turn, after the summary before, and keeps the summary for its prompts.

    Its output is the summary with its source range; null when there is nothing to summarise.
    """

    kind: Literal["summarize"]
    model: str | None = Field(default=None, min_length=1)
    fallback: Fallback | None = None
    #: The id of the conversation.
    conversation: Template
    #: Most tokens of the summary.
    max_tokens: int = Field(default=256, ge=32, le=8_000)
    #: The last messages that are left out: as many whole turns as have so many tokens.
    keep_tokens: int = Field(default=512, ge=0, le=1_000_000)

    def templates(self) -> Iterator[tuple[str, str]]:
        yield "conversation", self.conversation

"""
A family of models, as data: the form of its tool calls, its thinking, its end of a turn, its recommended sampling.

A family never replaces the chat template of a file. A number is here only if its publisher recommends it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from app.catalog.source import CatalogTable

#: The forms in which models write tool calls; `workers.engine.chat.call_forms` reads and writes them.
ToolCallStyle = Literal["hermes", "llama3", "mistral", "mistral-args", "phi4", "deepseek", "harmony", "coder"]


class RecommendedSampling(CatalogTable):
    """Sampling parameters for requests that set none. None leaves the default."""

    temperature: float | None = Field(default=None, ge=0, le=5, description="0 to 5")
    top_p: float | None = Field(default=None, ge=0, le=1, description="0 to 1")
    top_k: int | None = Field(default=None, ge=0, le=1_000_000, description="0 to 1000000; 0 keeps all tokens")
    min_p: float | None = Field(default=None, ge=0, le=1, description="0 to 1")
    repeat_penalty: float | None = Field(default=None, gt=0, le=5, description="above 0, up to 5")

    def over(self, other: RecommendedSampling) -> RecommendedSampling:
        """Return the values of both; where both have one, that of this."""
        return RecommendedSampling(**other.shown() | self.shown())

    def shown(self) -> dict[str, Any]:
        """The values that are set."""
        return self.model_dump(exclude_none=True)


#: No recommendation.
NO_SAMPLING = RecommendedSampling()


@dataclass(frozen=True, slots=True)
class ThinkingTags:
    """The texts around the thinking of a model."""

    opening: str = "<think>"
    closing: str = "</think>"


@dataclass(frozen=True, slots=True)
class Family:
    """One family."""

    name: str
    #: Which models it means.
    title: str
    #: None: the style is recognised in the template.
    tools: ToolCallStyle | None = None
    #: None: its models do not think in a block of their own.
    thinking: ThinkingTags | None = None
    #: Answers are messages in channels (OpenAI's harmony): thinking, calls and text are told apart by their headers.
    has_channels: bool = False
    #: How its template is given tools that it does not list by itself: as JSON in the system message.
    tools_in_system: bool = False
    #: Its template has no earlier calls: they are written into the content.
    calls_in_content: bool = False
    #: Its template has earlier calls, with arguments that are texts, in messages whose content is none.
    calls_as_texts: bool = False
    #: Control tokens that end a turn, also where a file does not mark them as such.
    ends: tuple[str, ...] = ()
    sampling: RecommendedSampling = NO_SAMPLING
    #: Replaces `sampling` where a request switches thinking off.
    sampling_unthinking: RecommendedSampling | None = None
    #: Where the publisher recommends the sampling.
    published: str = ""


@dataclass(frozen=True, slots=True)
class Marks:
    """By what the models of a family are recognised."""

    family: Family
    #: Values of `general.architecture`; empty for any.
    architectures: tuple[str, ...]
    #: Parts of the chat template that must be there, and that must not.
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    #: One of these words is in `general.name` or `general.basename`; empty for any name.
    names: tuple[str, ...] = ()

"""
The profile of a model: its family, detected from what its file says or named in the catalogue, and what follows.

A value of the catalogue entry comes before one of the file, and that before one of the family.
Nothing here opens a file; the caller has read the header.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from app.catalog.metadata import Header
from app.catalog.model import SHIPPED_TEMPLATES, PromptProfile
from app.catalog.profiles.families import FAMILIES, MARKS
from app.catalog.profiles.family import Family, Marks, RecommendedSampling, ThinkingTags, ToolCallStyle

#: The value of `prompt.profile` of a model that is served without a family.
NONE = "none"
#: Keys of recommended sampling in a file, by the name of the parameter.
SAMPLING_KEYS: Mapping[str, str] = {
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "top_k": "general.sampling.top_k",
    "min_p": "general.sampling.min_p",
    "repeat_penalty": "general.sampling.penalty_repeat",
}


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a file says of itself."""

    architecture: str
    #: The template that is used, which may be that of the catalogue.
    template: str
    #: `general.name` and `general.basename`.
    names: str = ""
    #: Values of `SAMPLING_KEYS`, as numbers or texts.
    sampling: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """The profile of one model."""

    family: Family | None
    #: Why it is this family, or none.
    reason: str
    tools: ToolCallStyle | None
    #: What the file recommends, and what the catalogue says.
    of_file: RecommendedSampling
    of_entry: RecommendedSampling

    @property
    def name(self) -> str:
        """The name of the family."""
        return NONE if self.family is None else self.family.name

    @property
    def thinking(self) -> ThinkingTags | None:
        """The tags of its thinking."""
        return None if self.family is None else self.family.thinking

    @property
    def thinks(self) -> bool:
        """Whether its models can think apart from the answer."""
        return self.family is not None and (self.family.thinking is not None or self.family.has_channels)

    @property
    def ends(self) -> tuple[str, ...]:
        """The control tokens that end its turns."""
        return () if self.family is None else self.family.ends

    def sampling(self, *, thinks: bool = True) -> RecommendedSampling:
        """The sampling of requests that set none; `thinks` is false where thinking is switched off."""
        found = RecommendedSampling()
        if self.family is not None:
            unthinking = self.family.sampling_unthinking
            found = self.family.sampling if thinks or unthinking is None else unthinking
        # A file has one recommendation, which is that of its thinking.
        of_file = self.of_file if thinks or self.family is None or self.family.sampling_unthinking is None else None
        return self.of_entry.over(found if of_file is None else of_file.over(found))


def resolve(prompt: PromptProfile, facts: FileFacts) -> ModelProfile:
    """Return the profile of a model with this entry and file."""
    if prompt.profile == NONE:
        family, reason = None, "the catalogue says so"
    elif prompt.profile is not None:
        family, reason = FAMILIES[prompt.profile], "named in the catalogue"
    elif prompt.chat_template in SHIPPED_TEMPLATES:
        family, reason = None, "the catalogue sets a shipped template, which is of no family"
    else:
        family, reason = _detected(facts)
    style = prompt.tools or (family.tools if family is not None else None) or recognised_style(facts.template)
    of_file = RecommendedSampling() if prompt.profile == NONE else _of_file(facts.sampling or {})
    return ModelProfile(family, reason, style, of_file, prompt.sampling)


def facts_of(read: Header, prompt: PromptProfile) -> FileFacts:
    """What a header says."""
    given = (read.metadata.get(f"general.{key}") for key in ("name", "basename"))
    return FileFacts(
        read.architecture,
        prompt.chat_template or read.chat_template or "",
        " ".join(value for value in given if isinstance(value, str)),
        {name: read.metadata[key] for name, key in SAMPLING_KEYS.items() if key in read.metadata},
    )


def recognised_style(template: str) -> ToolCallStyle | None:
    """The style of tool calls that a template shows."""
    if "<tool_call>" in template:
        return "coder" if "<function=" in template else "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral-args" if "[ARGS]" in template else "mistral"
    if "<|python_tag|>" in template or '"parameters":' in template:
        return "llama3"
    return None


def _detected(facts: FileFacts) -> tuple[Family | None, str]:
    if not facts.template:
        return None, "the file has no chat template"
    for marks in MARKS:
        if _fits(marks, facts):
            return marks.family, _why(marks, facts)
    return None, f"no family has the architecture {facts.architecture} and this template"


def _fits(marks: Marks, facts: FileFacts) -> bool:
    names = facts.names.lower()
    return (
        (not marks.architectures or facts.architecture in marks.architectures)
        and all(part in facts.template for part in marks.has)
        and not any(part in facts.template for part in marks.lacks)
        and (not marks.names or any(word in names for word in marks.names))
    )


def _why(marks: Marks, facts: FileFacts) -> str:
    found = [f"the architecture {facts.architecture}"] if marks.architectures else []
    found += [f"{part.strip()!r} in the template" for part in marks.has]
    found += [f"{word!r} in its name" for word in marks.names if word in facts.names.lower()]
    return ", ".join(found)


def _of_file(values: Mapping[str, Any]) -> RecommendedSampling:
    """What a file recommends. A value that is no number or out of its bounds is left out: files are foreign."""
    found = RecommendedSampling()
    for name, value in values.items():
        try:
            number = float(value)
            if not math.isfinite(number):
                continue
            # Files have 32-bit numbers: 0.7 is stored as 0.699999988.
            given = {name: int(number) if name == "top_k" else round(number, 6)}
            found = RecommendedSampling(**given).over(found)
        except (TypeError, ValueError, OverflowError, ValidationError):
            continue
    return found

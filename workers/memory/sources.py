"""
The sources of what a prompt has beside its conversation: memory blocks, personal context, recalled texts.

A source that finds nothing gives an empty part; a part without a source is no part of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID

from app.memory.assembly.parts import Candidate, PromptPart
from app.workflows.language.memory_options import MemoryOptions
from workers.engine import Engine
from workers.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Sought:
    """For whom and for what something is looked for."""

    namespace: str
    user: str | None
    conversation: UUID | None
    #: The text that recalled texts and documents should have to do with; may be empty.
    query: str
    options: MemoryOptions


def find(runtime: Runtime, sought: Sought, engine: Engine) -> Mapping[PromptPart, tuple[Candidate, ...]]:
    """Return what each source found, counted, the best first."""
    return {}

"""The rule of a step: what its definition says, as far as its states depend on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from app.workflows.language.steps import Fallback, Retry

Join = Literal["all", "any", "all_done"]


@dataclass(frozen=True, slots=True)
class StepRule:
    """What the definition says of a step, as far as its states depend on it."""

    #: The id of each step that it needs, and the branch of it if that matters.
    needs: tuple[tuple[str, str | None], ...] = ()
    join: Join = "all"
    #: It has a condition, or is a switch: it is decided before it begins.
    decided: bool = False
    retry: Retry = field(default_factory=Retry)
    #: How many models it can ask, and when the next is asked.
    models: int = 1
    fallback: Fallback | None = None
    allow_failure: bool = False
    #: It runs when the run does not succeed, and never otherwise.
    on_failure: bool = False

"""The rule of a step: the part of its definition that the state machine uses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from app.workflows.language.step_work import Fallback, Retry

Join = Literal["all", "any", "all_done"]


@dataclass(frozen=True, slots=True)
class StepRule:
    """The part of a step's definition that decides its state transitions."""

    #: The id of each needed step, and the required branch or None.
    needs: tuple[tuple[str, str | None], ...] = ()
    join: Join = "all"
    #: Whether the step has a condition or is a switch, which is evaluated before the step starts.
    decided: bool = False
    retry: Retry = field(default_factory=Retry)
    #: The number of models that the step can try.
    models: int = 1
    #: When the next model is tried.
    fallback: Fallback | None = None
    allow_failure: bool = False
    #: Whether the step runs only when the run does not succeed.
    on_failure: bool = False

"""Priority: the urgency class of a step."""

from __future__ import annotations

from enum import StrEnum


class Priority(StrEnum):
    """The urgency class of a step, the most urgent first."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BATCH = "batch"

    #: That of the text, which is kept; an enumeration computes its own each time, and plans look classes up often.
    __hash__ = str.__hash__

    @property
    def rank(self) -> int:
        """The position of the class: 0 is the most urgent."""
        return _RANKS[self]


_RANKS = {priority: rank for rank, priority in enumerate(Priority)}

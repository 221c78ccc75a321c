"""The section of memories: what is extracted from conversations."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from pydantic import Field

from app.kernel.sections.section import CHANGEABLE, Section
from app.kernel.units import durations
from app.kernel.units.durations import Duration


class MemorySettings(Section):
    """Memories: facts, preferences, decisions, breakthroughs and patterns that outlast a conversation."""

    #: Whether memories are extracted from new messages, in the background, where neither the conversation nor its
    #: namespace says otherwise. Extraction calls a model.
    extract: Annotated[bool, CHANGEABLE] = False
    #: The model that extracts, or a selector, where the namespace names no other.
    model: Annotated[str, Field(min_length=1, max_length=200), CHANGEABLE] = "auto:extract"
    #: Interval of the job that starts extractions and writes what they found.
    check_every: Annotated[Duration, durations.at_least("100ms")] = timedelta(seconds=5)
    #: Messages are read when so many are new.
    messages: int = Field(default=12, ge=1, le=50)
    #: Fewer new messages are read when nothing was appended for so long.
    quiet: Annotated[Duration, durations.at_least("0s")] = timedelta(minutes=1)
    #: Most extractions at the same time.
    max_parallel: int = Field(default=8, ge=1, le=1000)
    #: An extraction that has not ended within this time is tried again later.
    timeout: Annotated[Duration, durations.at_least("1s")] = timedelta(hours=6)
    #: Retention of proposed memories that were refused.
    keep_refused: Annotated[Duration, durations.at_least("1m")] = timedelta(days=30)

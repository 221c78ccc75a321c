"""The section `cache` of the settings: the response cache of the API."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from pydantic import Field

from app.kernel.sections.section import Section
from app.kernel.units import durations
from app.kernel.units.durations import Duration


class CacheSettings(Section):
    """The response cache: answers to requests that were answered before. It must be equal for all API processes."""

    #: Whether answers are cached. Only deterministic requests are, and those that ask for it with `Cache-Control`.
    enabled: bool = True
    #: For how long an answer is kept.
    ttl: Annotated[Duration, durations.at_least("1s")] = timedelta(hours=1)
    #: Most bytes of one answer; a longer one is not kept.
    max_entry_bytes: int = Field(default=256 * 1024, ge=1024, le=64 * 1024 * 1024)
    #: Most bytes of all answers together; beyond them, the answers that would expire first are removed.
    max_bytes: int = Field(default=64 * 1024 * 1024, ge=1024 * 1024)
    #: An embedding model of the catalogue: chats whose last message is similar get the answer of one another. Empty
    #: means that only equal requests do.
    near_model: str = ""
    #: Least cosine similarity of such messages.
    near_threshold: float = Field(default=0.97, ge=0.5, le=1)

"""The section of memory blocks."""

from __future__ import annotations

from pydantic import Field

from app.kernel.sections.section import Section


class BlockSettings(Section):
    """Memory blocks: labelled texts that models edit."""

    #: Most blocks of a namespace, archived ones included.
    max_blocks: int = Field(default=100_000, ge=1, le=10_000_000)
    #: Most blocks in context that are attached to the same conversation, agent, user or namespace.
    max_attached: int = Field(default=50, ge=1, le=500)
    #: Versions that are kept of a block; the oldest are removed.
    keep_versions: int = Field(default=500, ge=2, le=100_000)

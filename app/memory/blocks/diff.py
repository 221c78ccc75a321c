"""The difference between two versions of a block."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from app.memory.blocks.block import BlockVersion


@dataclass(frozen=True, slots=True)
class BlockDiff:
    """What changed from one version of a block to another."""

    #: The change of the value as a unified diff; empty when it is the same.
    text: str
    #: The fields that differ.
    changed: tuple[str, ...]


def diff(old: BlockVersion, new: BlockVersion) -> BlockDiff:
    """Return what changed."""
    lines = difflib.unified_diff(
        old.value.split("\n") if old.value else [],
        new.value.split("\n") if new.value else [],
        f"version {old.version}",
        f"version {new.version}",
        lineterm="",
    )
    changed = [name for name in ("value", "description", "limit") if getattr(old, name) != getattr(new, name)]
    return BlockDiff("\n".join(lines), tuple(changed))

"""
Memory blocks as a part of a prompt.

The same blocks give the same bytes, whatever their order, so that the kept prefix of a prompt stays usable.
A value stands as it was written, so that a model can quote it to its tools; only what would end it early is changed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from app.memory.blocks.block import Block

#: What would end a value, a block, or all blocks before their ends.
_ENDS = re.compile(r"</(?=\s*(?:value|description|block|memory_blocks)\b)", re.IGNORECASE)


def render(blocks: Sequence[Block]) -> str:
    """Return the blocks in the order of their labels; an empty text when there are none."""
    if not blocks:
        return ""
    parts = [_one(block) for block in sorted(blocks, key=lambda block: (block.label, block.id))]
    return "<memory_blocks>\n" + "\n".join(parts) + "\n</memory_blocks>"


def _one(block: Block) -> str:
    read_only = ' read_only="true"' if block.read_only else ""
    lines = [f'<block label="{block.label}" characters="{len(block.value)}/{block.limit}"{read_only}>']
    if block.description:
        lines.append(f"<description>{_inside(block.description)}</description>")
    return "\n".join([*lines, "<value>", _inside(block.value), "</value>", "</block>"])


def _inside(text: str) -> str:
    return _ENDS.sub(r"<\\/", text)

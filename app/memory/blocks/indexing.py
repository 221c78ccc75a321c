"""
Archived blocks as passages, so that recall finds them: for the users and the namespace that they are attached to.

What is attached to conversations or agents alone is found by `archival_search` there, and by nobody else.
"""

from __future__ import annotations

from collections.abc import Sequence

from app.kernel.database import UnitOfWork
from app.memory.blocks.block import Block, BlockTarget, BlockTargetKind
from app.memory.recall.passages import NewPassage, SourceKind
from app.memory.recall.storage import put_in, remove_in


def index_in(work: UnitOfWork, block: Block, targets: Sequence[BlockTarget]) -> None:
    """Write the passages of an archived block, in the place of earlier ones; one in context has none."""
    owners: list[str | None] = [one.name for one in targets if one.kind is BlockTargetKind.USER]
    if any(one.kind is BlockTargetKind.NAMESPACE for one in targets):
        owners.append(None)
    if block.archived_at is None or not owners:
        remove_in(work, block.namespace, SourceKind.BLOCK, [block.id])
        return
    text = f"{block.description}\n{block.value}" if block.description else block.value
    put_in(
        work,
        [
            NewPassage(
                block.namespace, SourceKind.BLOCK, block.id, text, user=owner, position=place, at=block.updated_at
            )
            for place, owner in enumerate(owners)
        ],
    )


def forget_in(work: UnitOfWork, namespace: str, block_ids: Sequence[str]) -> None:
    """Remove the passages of deleted blocks."""
    if block_ids:
        remove_in(work, namespace, SourceKind.BLOCK, block_ids)

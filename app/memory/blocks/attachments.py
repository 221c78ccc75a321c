"""
What blocks are attached to: the statements, each in the transaction of its caller.

At one target a label has one block, and so many blocks in context. A block is attached only to conversations that there
are, because it is detached with them.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import text

from app.kernel.database import UnitOfWork
from app.kernel.errors import InvalidInput, NotFound
from app.kernel.sections.blocks import BlockSettings
from app.memory.blocks.block import (
    Block,
    BlockTarget,
    BlockTargetKind,
    LabelTaken,
    TooManyBlocks,
    shown_target,
    target_problems,
)
from app.memory.blocks.block_id import parsed_id, shown_id
from app.memory.conversations import store as conversations
from app.memory.conversations.service import parsed_conversation

_ATTACH = text("""
    INSERT INTO memory_block_attachment (namespace, target_kind, target, label, block_id)
    VALUES (:namespace, :kind, :target, :label, :id)
    ON CONFLICT (namespace, target_kind, target, label) DO NOTHING
""")
_ATTACHED_HERE = text("""
    SELECT a.block_id, b.archived_at IS NOT NULL AS archived
    FROM memory_block_attachment AS a JOIN memory_block AS b ON b.id = a.block_id
    WHERE a.namespace = :namespace AND a.target_kind = :kind AND a.target = :target AND a.label = :label
""")
_COUNT_ATTACHED = text("""
    SELECT count(*) AS n FROM memory_block_attachment AS a JOIN memory_block AS b ON b.id = a.block_id
    WHERE a.namespace = :namespace AND a.target_kind = :kind AND a.target = :target AND b.archived_at IS NULL
""")
_DETACH = text("""
    DELETE FROM memory_block_attachment
    WHERE block_id = :id AND namespace = :namespace AND target_kind = :kind AND target = :target
""")
_ATTACHMENTS = text("""
    SELECT block_id, target_kind, target FROM memory_block_attachment WHERE block_id = ANY(:ids)
    ORDER BY block_id, target_kind, target
""")


def of_in(work: UnitOfWork, blocks: Sequence[Block]) -> dict[str, list[BlockTarget]]:
    """Return what blocks are attached to, by their ids."""
    found: dict[str, list[BlockTarget]] = {block.id: [] for block in blocks}
    if blocks:
        for row in work.rows(_ATTACHMENTS, {"ids": [parsed_id(block.id) for block in blocks]}):
            found[shown_id(row.block_id)].append(BlockTarget(BlockTargetKind(row.target_kind), row.target))
    return found


def add_in(work: UnitOfWork, block: Block, target: BlockTarget, settings: BlockSettings) -> None:
    """
    Attach a block; one that is attached already stays so.

    Raises LabelTaken, TooManyBlocks, InvalidInput, and NotFound for a conversation.
    """
    if problems := target_problems(target):
        raise InvalidInput(problems, "request")
    if target.kind is BlockTargetKind.CONVERSATION:
        _require_conversation(work, block.namespace, target.name)
    at = {"namespace": block.namespace, "kind": target.kind, "target": target.name}
    if not work.run(_ATTACH, {**at, "label": block.label, "id": parsed_id(block.id)}):
        other = work.row(_ATTACHED_HERE, {**at, "label": block.label})
        if other is not None and shown_id(other.block_id) != block.id:
            raise LabelTaken(block.label, target, shown_id(other.block_id), archived=other.archived)
        return
    require_room_in(work, block.namespace, target, settings)


def _require_conversation(work: UnitOfWork, namespace: str, shown: str) -> None:
    """Raise NotFound unless the namespace has the conversation: what is attached to it is deleted with it."""
    id_ = parsed_conversation(shown)
    found = None if id_ is None else conversations.find(work, id_)
    if found is None or found.namespace != namespace:
        raise NotFound("conversation", shown)


def is_label_taken_in(work: UnitOfWork, namespace: str, target: BlockTarget, label: str) -> bool:
    """Whether a block with this label is attached to something."""
    at = {"namespace": namespace, "kind": target.kind, "target": target.name}
    return work.row(_ATTACHED_HERE, {**at, "label": label}) is not None


def require_room_in(work: UnitOfWork, namespace: str, target: BlockTarget, settings: BlockSettings) -> None:
    """Raise TooManyBlocks when a target, the attachments of this transaction included, has too many in context."""
    count = work.row(_COUNT_ATTACHED, {"namespace": namespace, "kind": target.kind, "target": target.name})
    assert count is not None, "an aggregate has one row"
    if count.n > settings.max_attached:
        raise TooManyBlocks(
            f"{settings.max_attached} blocks in context are attached to {shown_target(target)}, and no more are "
            "accepted (setting blocks.max_attached); archive or detach some"
        )


def remove_in(work: UnitOfWork, block: Block, target: BlockTarget) -> bool:
    """Detach a block; False when it was not attached."""
    at = {"namespace": block.namespace, "kind": target.kind, "target": target.name}
    return bool(work.run(_DETACH, {**at, "id": parsed_id(block.id)}))

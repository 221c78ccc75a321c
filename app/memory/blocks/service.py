"""
What clients do with memory blocks: one call, one transaction.

An edit names the version that it is based on, and is refused with the current one when somebody else was first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from app.kernel.database import Database
from app.kernel.sections.blocks import BlockSettings
from app.memory.blocks import storage
from app.memory.blocks.block import (
    AttachedBlock,
    Block,
    BlockAuthor,
    BlockChange,
    BlockScope,
    BlockTarget,
    BlockVersion,
    NewBlock,
)
from app.memory.blocks.storage import BlockFilter


@dataclass(frozen=True, slots=True)
class BlockView:
    """A block with what it is attached to."""

    block: Block
    targets: tuple[BlockTarget, ...]


@dataclass(frozen=True, slots=True)
class BlockPage:
    """A part of the list of blocks, the newest first."""

    blocks: list[BlockView]
    #: The id after which the next page begins; None on the last page.
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Blocks:
    """The memory blocks of an installation. `namespace` is that of the caller; None for all of them."""

    database: Database
    settings: BlockSettings

    def create(
        self, namespace: str, new: NewBlock, author: BlockAuthor, targets: Sequence[BlockTarget] = ()
    ) -> BlockView:
        """Create a block and attach it. Raises InvalidInput, LabelTaken, TooManyBlocks."""
        with self.database.work() as work:
            block = storage.create_in(work, namespace, new, author, self.settings, targets=targets)
            return BlockView(block, tuple(storage.attachments_in(work, [block])[block.id]))

    def get(self, namespace: str | None, id_: str) -> BlockView:
        """Return a block. Raises NotFound."""
        with self.database.work() as work:
            block = storage.get_in(work, namespace, id_)
            return BlockView(block, tuple(storage.attachments_in(work, [block])[block.id]))

    def page(self, wanted: BlockFilter, *, after: str | None = None, limit: int = 100) -> BlockPage:
        """Return blocks, the newest first."""
        with self.database.work() as work:
            found = storage.list_in(work, wanted, after=after, limit=limit + 1)
        views = [BlockView(block, tuple(targets)) for block, targets in found[:limit]]
        return BlockPage(views, views[-1].block.id if len(found) > limit else None)

    def in_context(self, scope: BlockScope) -> list[AttachedBlock]:
        """Return the blocks that prompts of a scope contain, in the order of their labels."""
        with self.database.work() as work:
            return storage.in_context_in(work, scope)

    def edit(
        self, namespace: str | None, id_: str, change: BlockChange, author: BlockAuthor, *, expected: int
    ) -> BlockView:
        """Change a block whose version is `expected`. Raises NotFound, BlockChanged, InvalidInput."""
        with self.database.work() as work:
            block = storage.get_in(work, namespace, id_, hold=True)
            block = storage.change_in(work, block, change, author, self.settings, expected=expected)
            return BlockView(block, tuple(storage.attachments_in(work, [block])[block.id]))

    def rollback(
        self, namespace: str | None, id_: str, version: int, author: BlockAuthor, *, expected: int
    ) -> BlockView:
        """Make a new version that says what an earlier one said. Raises NotFound, BlockChanged."""
        with self.database.work() as work:
            block = storage.get_in(work, namespace, id_, hold=True)
            block = storage.rollback_in(work, block, version, author, self.settings, expected=expected)
            return BlockView(block, tuple(storage.attachments_in(work, [block])[block.id]))

    def versions(
        self, namespace: str | None, id_: str, *, before: int | None = None, limit: int = 50
    ) -> list[BlockVersion]:
        """Return versions, the newest first. Raises NotFound."""
        with self.database.work() as work:
            return storage.versions_in(work, storage.get_in(work, namespace, id_), before=before, limit=limit)

    def version(self, namespace: str | None, id_: str, version: int) -> BlockVersion:
        """Return one version. Raises NotFound."""
        with self.database.work() as work:
            return storage.version_in(work, storage.get_in(work, namespace, id_), version)

    def attach(self, namespace: str | None, id_: str, target: BlockTarget) -> BlockView:
        """Attach a block. Raises NotFound, LabelTaken, TooManyBlocks, InvalidInput."""
        with self.database.work() as work:
            block = storage.get_in(work, namespace, id_, hold=True)
            storage.attach_in(work, block, target, self.settings)
            return BlockView(block, tuple(storage.attachments_in(work, [block])[block.id]))

    def detach(self, namespace: str | None, id_: str, target: BlockTarget) -> BlockView:
        """Detach a block; one that is not attached stays so. Raises NotFound."""
        with self.database.work() as work:
            block = storage.get_in(work, namespace, id_, hold=True)
            storage.detach_in(work, block, target)
            return BlockView(block, tuple(storage.attachments_in(work, [block])[block.id]))

    def set_archived(self, namespace: str | None, id_: str, *, archived: bool) -> BlockView:
        """Archive a block or take it back into context. Raises NotFound, TooManyBlocks."""
        with self.database.work() as work:
            block = storage.get_in(work, namespace, id_, hold=True)
            block = storage.set_archived_in(work, block, self.settings, archived=archived)
            return BlockView(block, tuple(storage.attachments_in(work, [block])[block.id]))

    def delete(self, namespace: str | None, id_: str) -> None:
        """Delete a block with its versions. Raises NotFound."""
        with self.database.work() as work:
            storage.delete_in(work, storage.get_in(work, namespace, id_, hold=True))

"""
Templates: named sets of blocks that are created together and attached to the same things.

A template is stored in a namespace, or shipped; a stored one goes before a shipped one of the same name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from sqlalchemy import text

from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import Conflict, InvalidInput, NotFound, Problem
from app.kernel.sections.blocks import BlockSettings
from app.memory.blocks import storage
from app.memory.blocks.block import (
    Block,
    BlockAuthor,
    BlockTarget,
    NewBlock,
    label_problems,
)

#: Most blocks of a template, and most templates of a namespace.
MAX_BLOCKS, MAX_TEMPLATES = 20, 1_000

#: Templates that every namespace has.
SHIPPED: Mapping[str, tuple[NewBlock, ...]] = MappingProxyType(
    {
        "assistant": (
            NewBlock("human", "", "What you know about the user: name, preferences, plans. Keep it up to date."),
            NewBlock("persona", "", "Who you are, and how you answer.", read_only=True),
        ),
        "project": (
            NewBlock("goals", "", "What the project shall reach."),
            NewBlock("decisions", "", "What was decided, with the reason and the date."),
            NewBlock("open", "", "Open questions and next steps."),
        ),
    }
)

_LIST = text("SELECT name, document, updated_at FROM memory_block_template WHERE namespace = :namespace ORDER BY name")
_GET = text("""
    SELECT name, document, updated_at FROM memory_block_template WHERE namespace = :namespace AND name = :name
""")
_PUT = text("""
    INSERT INTO memory_block_template (namespace, name, document) VALUES (:namespace, :name, CAST(:document AS json))
    ON CONFLICT (namespace, name) DO UPDATE SET document = CAST(:document AS json), updated_at = now()
""")
_DELETE = text("DELETE FROM memory_block_template WHERE namespace = :namespace AND name = :name")
_COUNT = text("SELECT count(*) AS n FROM memory_block_template WHERE namespace = :namespace")


class ExistingLabels(StrEnum):
    """What happens when a label of a template is attached there already."""

    #: Nothing is created.
    REFUSE = "refuse"
    #: The block that is there stays, and the others are created.
    KEEP = "keep"


@dataclass(frozen=True, slots=True)
class BlockTemplate:
    """A set of blocks."""

    name: str
    blocks: tuple[NewBlock, ...]
    #: None for a shipped one.
    updated_at: datetime | None


@dataclass(frozen=True, slots=True)
class BlockTemplates:
    """The templates of all namespaces."""

    database: Database
    settings: BlockSettings

    def all(self, namespace: str) -> list[BlockTemplate]:
        """Return the templates of a namespace, by name."""
        with self.database.work() as work:
            stored = {row.name: _template(row) for row in work.rows(_LIST, {"namespace": namespace})}
        shipped = {name: BlockTemplate(name, blocks, None) for name, blocks in SHIPPED.items()}
        return sorted((shipped | stored).values(), key=lambda one: one.name)

    def get(self, namespace: str, name: str) -> BlockTemplate:
        """Return a template. Raises NotFound."""
        with self.database.work() as work:
            return _get_in(work, namespace, name)

    def put(self, namespace: str, name: str, blocks: Sequence[NewBlock]) -> BlockTemplate:
        """Store a template, in the place of one with the same name. Raises InvalidInput, Conflict."""
        problems = label_problems(name, "name")
        labels = [block.label for block in blocks]
        if not 1 <= len(blocks) <= MAX_BLOCKS:
            problems.append(Problem("blocks", f"it has {len(blocks)} blocks", f"1 to {MAX_BLOCKS}"))
        problems += [
            Problem(f"blocks[{at}].label", f"the label {label!r} occurs twice", "a label for each block")
            for at, label in enumerate(labels)
            if label in labels[:at]
        ]
        if problems:
            raise InvalidInput(problems, "template")
        document = json.dumps({"blocks": [_plain(block) for block in blocks]})
        with self.database.work() as work:
            count = work.row(_COUNT, {"namespace": namespace})
            if count is not None and count.n >= MAX_TEMPLATES:
                raise Conflict(f"the namespace {namespace!r} has {count.n} templates, and no more are accepted")
            work.execute(_PUT, {"namespace": namespace, "name": name, "document": document})
            return _get_in(work, namespace, name)

    def delete(self, namespace: str, name: str) -> None:
        """Remove a stored template. Raises NotFound."""
        with self.database.work() as work:
            if not work.run(_DELETE, {"namespace": namespace, "name": name}):
                raise NotFound("stored template", name)

    def apply(
        self,
        namespace: str,
        name: str,
        author: BlockAuthor,
        targets: Sequence[BlockTarget],
        existing: ExistingLabels = ExistingLabels.REFUSE,
    ) -> list[Block]:
        """
        Create all blocks of a template and attach them, or none of them.

        Raises NotFound, LabelTaken, TooManyBlocks, InvalidInput.
        """
        with self.database.work() as work:
            made = []
            for new in _get_in(work, namespace, name).blocks:
                taken = [one for one in targets if storage.is_label_taken_in(work, namespace, one, new.label)]
                if taken and existing is ExistingLabels.KEEP:
                    continue
                operation = f"template {name}"
                made.append(
                    storage.create_in(
                        work, namespace, new, author, self.settings, targets=targets, operation=operation[:64]
                    )
                )
            return made


def parsed(document: Any) -> list[NewBlock]:
    """Return the blocks of a template as it is stored."""
    return [NewBlock(**block) for block in document["blocks"]]


def _get_in(work: UnitOfWork, namespace: str, name: str) -> BlockTemplate:
    row = work.row(_GET, {"namespace": namespace, "name": name})
    if row is not None:
        return _template(row)
    if name in SHIPPED:
        return BlockTemplate(name, SHIPPED[name], None)
    raise NotFound("template", name)


def _template(row: Any) -> BlockTemplate:
    return BlockTemplate(row.name, tuple(parsed(row.document)), row.updated_at)


def _plain(block: NewBlock) -> dict[str, Any]:
    return {
        "label": block.label,
        "value": block.value,
        "description": block.description,
        "limit": block.limit,
        "read_only": block.read_only,
    }

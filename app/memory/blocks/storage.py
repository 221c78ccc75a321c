"""
The statements on memory blocks. Each runs in the transaction of its caller.

A change names the version that it is based on, and is refused when the block has another one. Blocks of other
namespaces are not found.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from uuid import UUID

from sqlalchemy import TextClause, text

from app.kernel import ids
from app.kernel.database import UnitOfWork
from app.kernel.errors import InvalidInput, NotFound
from app.kernel.sections.blocks import BlockSettings
from app.memory.blocks import indexing
from app.memory.blocks.block import (
    PREFIX,
    AttachedBlock,
    Block,
    BlockAuthor,
    BlockAuthorKind,
    BlockChange,
    BlockChanged,
    BlockScope,
    BlockTarget,
    BlockTargetKind,
    BlockVersion,
    LabelTaken,
    NewBlock,
    TooManyBlocks,
    nearest,
    shown_target,
    target_problems,
    text_problems,
)

_DIGITS = re.compile(r"[0-9a-f]{32}", re.ASCII)
#: Most characters of the name of an author that are stored.
_MAX_AUTHOR = 200

_COLUMNS = """
    b.id, b.namespace, b.label, b.description, b.value, b.char_limit, b.read_only, b.version, b.archived_at,
    b.created_at, b.updated_at
"""
_GET = f"""
    SELECT {_COLUMNS} FROM memory_block AS b
    WHERE b.id = :id AND (CAST(:namespace AS text) IS NULL OR b.namespace = :namespace)
"""
_FIND, _HOLD = text(_GET), text(f"{_GET} FOR UPDATE")
_COUNT = text("SELECT count(*) AS n FROM memory_block WHERE namespace = :namespace")
_INSERT = text("""
    INSERT INTO memory_block (id, namespace, label, description, value, char_limit, read_only, version, archived_at)
    VALUES (:id, :namespace, :label, :description, :value, :limit, :read_only, 1,
            CASE WHEN :archived THEN now() ELSE NULL END)
""")
_INSERT_VERSION = text("""
    INSERT INTO memory_block_version
        (block_id, version, value, description, char_limit, author_kind, author, run_id, step, operation)
    SELECT id, version, value, description, char_limit, :author_kind, :author, :run_id, :step, :operation
    FROM memory_block WHERE id = :id
""")
_CHANGE = text("""
    UPDATE memory_block SET value = :value, description = :description, char_limit = :limit, read_only = :read_only,
                            version = version + :step, updated_at = now()
    WHERE id = :id AND version = :expected
""")
_PRUNE = text("""
    DELETE FROM memory_block_version WHERE block_id = :id AND version <= (
        SELECT version FROM memory_block_version WHERE block_id = :id ORDER BY version DESC OFFSET :keep LIMIT 1
    )
""")
_VERSION_COLUMNS = "version, value, description, char_limit, author_kind, author, run_id, step, operation, created_at"
_VERSIONS = text(f"""
    SELECT {_VERSION_COLUMNS} FROM memory_block_version
    WHERE block_id = :id AND (CAST(:before AS integer) IS NULL OR version < :before)
    ORDER BY version DESC LIMIT :limit
""")
_VERSION = text(f"SELECT {_VERSION_COLUMNS} FROM memory_block_version WHERE block_id = :id AND version = :version")
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
_IN_SCOPE = """
    SELECT {columns}, a.target_kind, a.target
    FROM memory_block_attachment AS a JOIN memory_block AS b ON b.id = a.block_id
    WHERE a.namespace = :namespace AND b.archived_at IS {archived}
      AND (a.target_kind, a.target) IN (SELECT * FROM unnest(CAST(:kinds AS text[]), CAST(:targets AS text[])))
    ORDER BY a.label, b.id
"""
_IN_CONTEXT = text(_IN_SCOPE.format(columns=_COLUMNS, archived="NULL"))
_ARCHIVED = text(_IN_SCOPE.format(columns=_COLUMNS, archived="NOT NULL AND b.id = ANY(:ids)"))
#: Any of the words of a query, by rank. The archived blocks of a scope are few: they need no index of words.
_SEARCH = text(f"""
    WITH query AS (
        SELECT to_tsquery('simple', string_agg(quote_literal(lexeme), ' | ')) AS words
        FROM unnest(to_tsvector('simple', :query))
    ), scope AS (
        SELECT DISTINCT ON (b.id) {_COLUMNS},
               to_tsvector('simple', b.label || ' ' || b.description || ' ' || b.value) AS lexemes
        FROM memory_block_attachment AS a JOIN memory_block AS b ON b.id = a.block_id
        WHERE a.namespace = :namespace AND b.archived_at IS NOT NULL
          AND (a.target_kind, a.target) IN (SELECT * FROM unnest(CAST(:kinds AS text[]), CAST(:targets AS text[])))
    )
    SELECT b.* FROM scope AS b, query WHERE b.lexemes @@ query.words
    ORDER BY ts_rank(b.lexemes, query.words, 1) DESC, b.id DESC LIMIT :limit
""")
_SET_ARCHIVED = text("""
    UPDATE memory_block SET archived_at = CASE WHEN :archived THEN COALESCE(archived_at, now()) ELSE NULL END
    WHERE id = :id
""")
_DELETE = text("DELETE FROM memory_block WHERE id = :id")
_DETACH_ALL_OF = text("""
    DELETE FROM memory_block_attachment WHERE namespace = :namespace AND target_kind = :kind AND target = :target
    RETURNING block_id
""")
_DELETE_DETACHED = text("""
    DELETE FROM memory_block AS b
    WHERE b.id = ANY(:ids) AND NOT EXISTS (SELECT FROM memory_block_attachment AS a WHERE a.block_id = b.id)
    RETURNING b.id
""")


@dataclass(frozen=True, slots=True)
class BlockFilter:
    """Which blocks of a list are shown."""

    namespace: str | None
    label: str | None = None
    #: In context, archived, or both.
    archived: bool | None = None
    target: BlockTarget | None = None
    #: A part of the label, the description or the value, in any case.
    query: str | None = None


def shown_id(id_: UUID) -> str:
    """Return the id of a block as the API shows it."""
    return f"{PREFIX}{id_.hex}"


def parsed_id(shown: str) -> UUID:
    """Return the id that a text shows. Raises NotFound: a text that is no id is the id of nothing."""
    digits = shown.removeprefix(PREFIX)
    if not shown.startswith(PREFIX) or not _DIGITS.fullmatch(digits):
        raise NotFound("block", shown)
    return UUID(digits)


def get_in(work: UnitOfWork, namespace: str | None, id_: str, *, hold: bool = False) -> Block:
    """Return a block of a namespace, or of any; with `hold`, nobody else changes it meanwhile. Raises NotFound."""
    row = work.row(_HOLD if hold else _FIND, {"id": parsed_id(id_), "namespace": namespace})
    if row is None:
        raise NotFound("block", id_)
    return _block(row)


def create_in(
    work: UnitOfWork,
    namespace: str,
    new: NewBlock,
    author: BlockAuthor,
    settings: BlockSettings,
    *,
    targets: Sequence[BlockTarget] = (),
    archived: bool = False,
    operation: str = "create",
) -> Block:
    """Create a block and attach it. Raises TooManyBlocks, LabelTaken, InvalidInput."""
    count = work.row(_COUNT, {"namespace": namespace})
    assert count is not None, "an aggregate has one row"
    if count.n >= settings.max_blocks:
        raise TooManyBlocks(
            f"the namespace {namespace!r} has {count.n} blocks, and no more are accepted (setting blocks.max_blocks)"
        )
    id_ = ids.new_id()
    values = {"label": new.label, "description": new.description, "value": new.value, "limit": new.limit}
    work.execute(
        _INSERT,
        {"id": id_, "namespace": namespace, "read_only": new.read_only, "archived": archived, **values},
    )
    _note(work, id_, author, operation)
    block = get_in(work, namespace, shown_id(id_))
    for target in targets:
        _attach(work, block, target, settings)
    if archived:
        _index(work, block)
    return block


def change_in(
    work: UnitOfWork,
    block: Block,
    change: BlockChange,
    author: BlockAuthor,
    settings: BlockSettings,
    *,
    expected: int,
    operation: str = "edit",
) -> Block:
    """
    Change a block whose version is `expected`. Raises BlockChanged when it is another one, and InvalidInput.

    What changes nothing makes no version.
    """
    if block.version != expected:
        raise BlockChanged(block.label, expected, block.version)
    value = block.value if change.value is None else change.value
    description = block.description if change.description is None else change.description
    limit = block.limit if change.limit is None else change.limit
    if problems := text_problems(value, description, limit):
        raise InvalidInput(problems, "block")
    read_only = block.read_only if change.read_only is None else change.read_only
    step = int((value, description, limit) != (block.value, block.description, block.limit))
    if not step and read_only == block.read_only:
        return block
    id_ = parsed_id(block.id)
    values = {"value": value, "description": description, "limit": limit, "read_only": read_only}
    if not work.run(_CHANGE, {"id": id_, "expected": expected, "step": step, **values}):
        raise BlockChanged(block.label, expected, get_in(work, block.namespace, block.id).version)
    if step:
        _note(work, id_, author, operation)
        work.execute(_PRUNE, {"id": id_, "keep": settings.keep_versions})
    changed = get_in(work, block.namespace, block.id)
    if changed.archived_at is not None:
        _index(work, changed)
    return changed


def _note(work: UnitOfWork, id_: UUID, author: BlockAuthor, operation: str) -> None:
    """Write what a block is now as its newest version."""
    by = {"author_kind": author.kind, "author": author.name[:_MAX_AUTHOR], "run_id": author.run_id, "step": author.step}
    work.execute(_INSERT_VERSION, {"id": id_, "operation": operation, **by})


def rollback_in(
    work: UnitOfWork, block: Block, version: int, author: BlockAuthor, settings: BlockSettings, *, expected: int
) -> Block:
    """Make a new version with the value, the description and the limit of an earlier one. Raises NotFound."""
    old = version_in(work, block, version)
    change = BlockChange(old.value, old.description, old.limit)
    operation = f"rollback to {version}"
    return change_in(work, block, change, author, settings, expected=expected, operation=operation)


def versions_in(work: UnitOfWork, block: Block, *, before: int | None = None, limit: int = 50) -> list[BlockVersion]:
    """Return versions, the newest first."""
    rows = work.rows(_VERSIONS, {"id": parsed_id(block.id), "before": before, "limit": limit})
    return [_version(row) for row in rows]


def version_in(work: UnitOfWork, block: Block, version: int) -> BlockVersion:
    """Return one version. Raises NotFound for one that never was, or is no longer kept."""
    # A number that the column cannot store is the number of no version.
    row = work.row(_VERSION, {"id": parsed_id(block.id), "version": version}) if 0 < version < 2**31 else None
    if row is None:
        raise NotFound(f"version of the block {block.label!r}", str(version))
    return _version(row)


def list_in(
    work: UnitOfWork, wanted: BlockFilter, *, after: str | None = None, limit: int = 100
) -> list[tuple[Block, list[BlockTarget]]]:
    """Return blocks by age, the newest first, with what they are attached to."""
    conditions, given = _conditions(wanted)
    if after is not None:
        conditions.append("b.id < :after")
        given["after"] = parsed_id(after)
    statement = text(f"""
        SELECT {_COLUMNS} FROM memory_block AS b WHERE {" AND ".join(["TRUE", *conditions])}
        ORDER BY b.id DESC LIMIT :limit
    """)
    found = [_block(row) for row in work.rows(statement, {**given, "limit": limit})]
    targets = attachments_in(work, found)
    return [(block, targets[block.id]) for block in found]


def _conditions(wanted: BlockFilter) -> tuple[list[str], dict[str, Any]]:
    conditions: list[str] = []
    given: dict[str, Any] = {}
    if wanted.namespace is not None:
        conditions.append("b.namespace = :namespace")
        given["namespace"] = wanted.namespace
    if wanted.label is not None:
        conditions.append("b.label = :label")
        given["label"] = wanted.label
    if wanted.archived is not None:
        conditions.append(f"b.archived_at IS {'NOT NULL' if wanted.archived else 'NULL'}")
    if wanted.target is not None:
        conditions.append(
            "EXISTS (SELECT FROM memory_block_attachment AS a WHERE a.block_id = b.id "
            "AND a.target_kind = :kind AND a.target = :target)"
        )
        given |= {"kind": wanted.target.kind, "target": wanted.target.name}
    if wanted.query is not None:
        conditions.append(
            "position(lower(:query) IN lower(b.label || chr(10) || b.description || chr(10) || b.value)) > 0"
        )
        given["query"] = wanted.query
    return conditions, given


def attachments_in(work: UnitOfWork, blocks: Sequence[Block]) -> dict[str, list[BlockTarget]]:
    """Return what blocks are attached to, by their ids."""
    found: dict[str, list[BlockTarget]] = {block.id: [] for block in blocks}
    if blocks:
        for row in work.rows(_ATTACHMENTS, {"ids": [parsed_id(block.id) for block in blocks]}):
            found[shown_id(row.block_id)].append(BlockTarget(BlockTargetKind(row.target_kind), row.target))
    return found


def attach_in(work: UnitOfWork, block: Block, target: BlockTarget, settings: BlockSettings) -> None:
    """Attach a block; one that is attached already stays so. Raises LabelTaken, TooManyBlocks, InvalidInput."""
    _attach(work, block, target, settings)
    if block.archived_at is not None:
        _index(work, block)


def _attach(work: UnitOfWork, block: Block, target: BlockTarget, settings: BlockSettings) -> None:
    if problems := target_problems(target):
        raise InvalidInput(problems, "request")
    at = {"namespace": block.namespace, "kind": target.kind, "target": target.name}
    if not work.run(_ATTACH, {**at, "label": block.label, "id": parsed_id(block.id)}):
        other = work.row(_ATTACHED_HERE, {**at, "label": block.label})
        if other is not None and shown_id(other.block_id) != block.id:
            raise LabelTaken(block.label, target, shown_id(other.block_id), archived=other.archived)
        return
    _require_room(work, block.namespace, target, settings)


def is_label_taken_in(work: UnitOfWork, namespace: str, target: BlockTarget, label: str) -> bool:
    """Whether a block with this label is attached to something."""
    at = {"namespace": namespace, "kind": target.kind, "target": target.name}
    return work.row(_ATTACHED_HERE, {**at, "label": label}) is not None


def _require_room(work: UnitOfWork, namespace: str, target: BlockTarget, settings: BlockSettings) -> None:
    """Raise TooManyBlocks when a target, the attachments of this transaction included, has too many in context."""
    count = work.row(_COUNT_ATTACHED, {"namespace": namespace, "kind": target.kind, "target": target.name})
    assert count is not None, "an aggregate has one row"
    if count.n > settings.max_attached:
        raise TooManyBlocks(
            f"{settings.max_attached} blocks in context are attached to {shown_target(target)}, and no more are "
            "accepted (setting blocks.max_attached); archive or detach some"
        )


def detach_in(work: UnitOfWork, block: Block, target: BlockTarget) -> bool:
    """Detach a block; False when it was not attached."""
    at = {"namespace": block.namespace, "kind": target.kind, "target": target.name}
    detached = bool(work.run(_DETACH, {**at, "id": parsed_id(block.id)}))
    if detached and block.archived_at is not None:
        _index(work, block)
    return detached


def _index(work: UnitOfWork, block: Block) -> None:
    indexing.index_in(work, block, attachments_in(work, [block])[block.id])


def in_context_in(work: UnitOfWork, scope: BlockScope) -> list[AttachedBlock]:
    """Return the blocks of a scope that prompts contain: one for each label, in the order of the labels."""
    return nearest(_of_scope(work, _IN_CONTEXT, scope))


def archived_in(work: UnitOfWork, scope: BlockScope, block_ids: Sequence[str]) -> list[AttachedBlock]:
    """Return the archived blocks of a scope that have these ids."""
    return _of_scope(work, _ARCHIVED, scope, {"ids": [parsed_id(id_) for id_ in block_ids]})


def search_archived_in(work: UnitOfWork, scope: BlockScope, query: str, limit: int) -> list[Block]:
    """Return archived blocks of a scope that have any of the words of a query, the best first."""
    found = work.rows(_SEARCH, {**_parameters(scope), "query": query, "limit": limit})
    return [_block(row) for row in found]


def _of_scope(
    work: UnitOfWork, statement: TextClause, scope: BlockScope, more: Mapping[str, Any] = MappingProxyType({})
) -> list[AttachedBlock]:
    return [
        AttachedBlock(_block(row), BlockTarget(BlockTargetKind(row.target_kind), row.target))
        for row in work.rows(statement, {**_parameters(scope), **more})
    ]


def _parameters(scope: BlockScope) -> dict[str, Any]:
    targets = scope.targets()
    return {
        "namespace": scope.namespace,
        "kinds": [target.kind.value for target in targets],
        "targets": [target.name for target in targets],
    }


def set_archived_in(work: UnitOfWork, block: Block, settings: BlockSettings, *, archived: bool) -> Block:
    """Archive a block or take it back into context. Raises TooManyBlocks."""
    work.execute(_SET_ARCHIVED, {"id": parsed_id(block.id), "archived": archived})
    targets = attachments_in(work, [block])[block.id]
    if not archived:
        for target in targets:
            _require_room(work, block.namespace, target, settings)
    changed = get_in(work, block.namespace, block.id)
    indexing.index_in(work, changed, targets)
    return changed


def delete_in(work: UnitOfWork, block: Block) -> None:
    """Delete a block with its versions and attachments."""
    work.execute(_DELETE, {"id": parsed_id(block.id)})
    indexing.forget_in(work, block.namespace, [block.id])


def delete_of_in(work: UnitOfWork, namespace: str, target: BlockTarget) -> list[str]:
    """
    Detach every block of a conversation, a user or an agent, and delete those that are attached to nothing else.

    Returns the ids of the deleted ones.
    """
    given = {"namespace": namespace, "kind": target.kind, "target": target.name}
    detached = [row.block_id for row in work.rows(_DETACH_ALL_OF, given)]
    if not detached:
        return []
    deleted = [shown_id(row.id) for row in work.rows(_DELETE_DETACHED, {"ids": detached})]
    indexing.forget_in(work, namespace, deleted)
    for id_ in {shown_id(one) for one in detached}.difference(deleted):
        if (kept := get_in(work, namespace, id_)).archived_at is not None:
            _index(work, kept)
    return deleted


def _block(row: Any) -> Block:
    return Block(
        shown_id(row.id),
        row.namespace,
        row.label,
        row.description,
        row.value,
        row.char_limit,
        row.read_only,
        row.version,
        row.archived_at,
        row.created_at,
        row.updated_at,
    )


def _version(row: Any) -> BlockVersion:
    author = BlockAuthor(BlockAuthorKind(row.author_kind), row.author, row.run_id, row.step)
    return BlockVersion(row.version, row.value, row.description, row.char_limit, author, row.operation, row.created_at)

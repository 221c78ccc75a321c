"""
The tools with which a model edits its memory blocks: their JSON Schemas, and what they do.

`call` runs in the transaction of its caller and never raises for what a model did wrong: it answers with a text that
says what to do instead, and has changed nothing. Blocks are those in context for the caller's scope, by label.
A block that a model creates belongs to the user of the conversation, or else to the conversation or the agent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from app.kernel import ids
from app.kernel.database import UnitOfWork
from app.kernel.errors import InvalidInput
from app.kernel.sections.blocks import BlockSettings
from app.memory.blocks import edits, storage
from app.memory.blocks.block import (
    DEFAULT_LIMIT,
    LABEL_ACCEPTED,
    MAX_DESCRIPTION,
    MAX_LABEL,
    MAX_LIMIT,
    AttachedBlock,
    Block,
    BlockAuthor,
    BlockChange,
    BlockScope,
    LabelTaken,
    NewBlock,
    TooManyBlocks,
)
from app.memory.blocks.edits import EditRefused
from app.memory.recall.passages import SourceKind
from app.memory.recall.query import Recalled, RecallQuery, RecallScope

#: Most characters of a text argument: nothing longer fits any block.
_MAX_TEXT = MAX_LIMIT
#: Found texts that `archival_search` returns, unless the model asks for fewer or more, and at most.
_RESULTS, _MAX_RESULTS = 5, 20
#: The beginning of the labels of texts that `archival_insert` stores.
_ARCHIVE_LABEL = "archive-"


@dataclass(frozen=True, slots=True)
class BlockToolContext:
    """For whom a tool works."""

    scope: BlockScope
    #: The model, with its run and step.
    author: BlockAuthor
    settings: BlockSettings
    #: What recall found for `recall_query`, before the transaction; None: texts are found by their words alone.
    recalled: Recalled | None = None


@dataclass(frozen=True, slots=True)
class BlockToolAnswer:
    """The answer of a tool, for the model."""

    text: str
    #: It was refused, and nothing was changed.
    is_error: bool = False


def _text(description: str, **more: Any) -> dict[str, Any]:
    return {"type": "string", "description": description, **more}


def _schema(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


_LABEL = _text("The label of the memory block.", minLength=1, maxLength=MAX_LABEL)

#: What each tool does, for the model.
DESCRIPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "memory_replace": "Replace a text in a memory block. The old text must occur in the block exactly once. "
        "To delete it, give an empty new text.",
        "memory_insert": "Insert a text as new lines of a memory block, by default at its end.",
        "memory_rethink": "Write a memory block anew: its whole value is replaced. Use it to reorganise or shorten it.",
        "memory_create": "Create a new memory block, which is then always in context.",
        "archival_insert": "Store a text in archival memory: it is not in context, but archival_search finds it.",
        "archival_search": "Search archival memory for texts about something.",
    }
)

#: The JSON Schema of the arguments of each tool.
SCHEMAS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "memory_replace": _schema(
            {
                "label": _LABEL,
                "old_string": _text("The exact text to replace, without line numbers.", maxLength=_MAX_TEXT),
                "new_string": _text("The text that replaces it.", maxLength=_MAX_TEXT),
            },
            *("label", "old_string", "new_string"),
        ),
        "memory_insert": _schema(
            {
                "label": _LABEL,
                "new_string": _text("The text to insert.", maxLength=_MAX_TEXT),
                "insert_line": {
                    "type": "integer",
                    "minimum": -1,
                    "description": "The line after which it is inserted: 0 for the beginning, -1 for the end.",
                    "default": -1,
                },
            },
            *("label", "new_string"),
        ),
        "memory_rethink": _schema(
            {"label": _LABEL, "new_memory": _text("The whole new value.", maxLength=_MAX_TEXT)},
            *("label", "new_memory"),
        ),
        "memory_create": _schema(
            {
                "label": _text(f"A new label: {LABEL_ACCEPTED}.", minLength=1, maxLength=MAX_LABEL),
                "description": _text("What the block is for.", maxLength=MAX_DESCRIPTION),
                "value": _text("Its first text.", maxLength=_MAX_TEXT, default=""),
                "limit": {
                    "type": "integer",
                    "minimum": 1,
                    "maximum": MAX_LIMIT,
                    "description": "Most characters of its text.",
                    "default": DEFAULT_LIMIT,
                },
            },
            *("label", "description"),
        ),
        "archival_insert": _schema(
            {
                "content": _text("The text to store.", minLength=1, maxLength=_MAX_TEXT),
                "description": _text("What it is about.", maxLength=MAX_DESCRIPTION, default=""),
            },
            "content",
        ),
        "archival_search": _schema(
            {
                "query": _text("What to look for.", minLength=1, maxLength=1_000),
                "limit": {
                    "type": "integer",
                    "minimum": 1,
                    "maximum": _MAX_RESULTS,
                    "description": "Most texts to return.",
                    "default": _RESULTS,
                },
            },
            "query",
        ),
    }
)


def recall_query(scope: BlockScope, name: str, arguments: Mapping[str, Any]) -> RecallQuery | None:
    """Return what shall be searched before `call`, outside of its transaction; None when there is nothing."""
    query = arguments.get("query")
    if name != "archival_search" or not isinstance(query, str) or not query.strip():
        return None
    query = query[: SCHEMAS[name]["properties"]["query"]["maxLength"]]
    whose = RecallScope.SHARED
    return RecallQuery(query, scope.namespace, scope.user, whose, limit=_MAX_RESULTS, sources=(SourceKind.BLOCK,))


def call(work: UnitOfWork, context: BlockToolContext, name: str, arguments: Mapping[str, Any]) -> BlockToolAnswer:
    """Run a tool. Its answer says what it did, or what is wrong with the call; it raises only for defects."""
    tool = _TOOLS.get(name)
    if tool is None:
        return BlockToolAnswer(f"there is no memory tool {name!r}; there are: {', '.join(_TOOLS)}", is_error=True)
    try:
        return BlockToolAnswer(tool(work, context, _checked(name, arguments)))
    except (EditRefused, LabelTaken, TooManyBlocks) as error:
        return BlockToolAnswer(str(error), is_error=True)
    except InvalidInput as error:
        return BlockToolAnswer("; ".join(str(problem) for problem in error.problems), is_error=True)


def _checked(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with the defaults of the others. Raises EditRefused with every problem."""
    properties, required = SCHEMAS[name]["properties"], SCHEMAS[name]["required"]
    accepted = ", ".join(properties)
    problems = [f"the argument {key!r} is missing" for key in required if key not in arguments]
    problems += [f"there is no argument {str(key)[:60]!r}" for key in arguments if key not in properties]
    for key in properties:
        if key in arguments:
            problems += _problems_of(key, arguments[key], properties[key])
    if problems:
        raise EditRefused(f"{name}: {'; '.join(problems[:10])}; its arguments are: {accepted}")
    defaults = {key: of["default"] for key, of in properties.items() if "default" in of}
    return {**defaults, **arguments}


def _problems_of(key: str, value: Any, schema: Mapping[str, Any]) -> list[str]:
    if schema["type"] == "integer":
        low, high = schema["minimum"], schema.get("maximum", 2**31 - 1)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            return [f"{key} must be a whole number from {low}" + (f" to {high}" if "maximum" in schema else "")]
        return []
    if not isinstance(value, str):
        return [f"{key} must be a text"]
    if len(value) > schema["maxLength"]:
        return [f"{key} has {len(value)} characters, and at most {schema['maxLength']} are accepted"]
    if not value.strip() and "minLength" in schema:
        return [f"{key} is empty"]
    return []


def _editable(work: UnitOfWork, context: BlockToolContext, label: str) -> Block:
    """Return a block of the scope, under a lock. Raises EditRefused when there is none, or it is read-only."""
    attached = {one.block.label: one for one in storage.in_context_in(work, context.scope)}
    found: AttachedBlock | None = attached.get(label) or attached.get(label.strip().lower())
    if found is None:
        known = ", ".join(attached) or "none yet; create one with memory_create"
        raise EditRefused(f"there is no memory block {label!r}; the blocks in context are: {known}")
    if found.block.read_only:
        raise EditRefused(
            f"the memory block {found.block.label!r} is read-only; keep what you learned in another block"
        )
    return storage.get_in(work, context.scope.namespace, found.block.id, hold=True)


def _write(work: UnitOfWork, context: BlockToolContext, block: Block, value: str, tool: str) -> str:
    edits.within(block.label, value, block.limit)
    change = BlockChange(value=value)
    changed = storage.change_in(
        work, block, change, context.author, context.settings, expected=block.version, operation=tool
    )
    if changed.version == block.version:
        return f"The memory block {block.label!r} says this already; nothing was changed."
    return (
        f"The memory block {block.label!r} was edited: {len(changed.value)} of {changed.limit} characters are used. "
        f"It now says:\n{changed.value}"
    )


def _replace(work: UnitOfWork, context: BlockToolContext, given: dict[str, Any]) -> str:
    block = _editable(work, context, given["label"])
    value = edits.replaced(block.label, block.value, given["old_string"], given["new_string"])
    return _write(work, context, block, value, "memory_replace")


def _insert(work: UnitOfWork, context: BlockToolContext, given: dict[str, Any]) -> str:
    block = _editable(work, context, given["label"])
    value = edits.inserted(block.value, given["new_string"], given["insert_line"])
    return _write(work, context, block, value, "memory_insert")


def _rethink(work: UnitOfWork, context: BlockToolContext, given: dict[str, Any]) -> str:
    block = _editable(work, context, given["label"])
    return _write(work, context, block, edits.rethought(block.value, given["new_memory"]), "memory_rethink")


def _create(work: UnitOfWork, context: BlockToolContext, given: dict[str, Any]) -> str:
    label = given["label"].strip().lower()
    if any(one.block.label == label for one in storage.in_context_in(work, context.scope)):
        raise EditRefused(
            f"there is a memory block {label!r} already; edit it with memory_insert or memory_replace, or use another "
            "label"
        )
    edits.within(label, given["value"], given["limit"])
    new = NewBlock(label, given["value"], given["description"], given["limit"])
    home = context.scope.home()
    block = storage.create_in(
        *(work, context.scope.namespace, new, context.author, context.settings),
        targets=[home],
        operation="memory_create",
    )
    return f"The memory block {block.label!r} was created: {len(block.value)} of {block.limit} characters are used."


def _archive(work: UnitOfWork, context: BlockToolContext, given: dict[str, Any]) -> str:
    content = given["content"]
    new = NewBlock(_ARCHIVE_LABEL + ids.new_id().hex, content, given["description"], max(len(content), DEFAULT_LIMIT))
    home = context.scope.home()
    storage.create_in(
        *(work, context.scope.namespace, new, context.author, context.settings),
        targets=[home],
        archived=True,
        operation="archival_insert",
    )
    return f"Stored in archival memory ({len(content)} characters); archival_search finds it."


def _search(work: UnitOfWork, context: BlockToolContext, given: dict[str, Any]) -> str:
    found = _archived(work, context, given["query"])[: given["limit"]]
    if not found:
        return f"Archival memory has nothing about {given['query']!r}. Try other words."
    entries = [
        f"{at}. ({block.created_at:%Y-%m-%d}{', ' + block.description if block.description else ''}) {block.value}"
        for at, block in enumerate(found, 1)
    ]
    return "\n".join([f"{len(found)} text(s) of archival memory:", *entries])


def _archived(work: UnitOfWork, context: BlockToolContext, query: str) -> list[Block]:
    """Return archived blocks, those that recall found first; each is attached to something of the scope."""
    by_words = storage.search_archived_in(work, context.scope, query, _MAX_RESULTS)
    if context.recalled is None:
        return by_words
    wanted = dict.fromkeys(passage.source_id for passage in context.recalled.passages)
    attached = {one.block.id: one.block for one in storage.archived_in(work, context.scope, list(wanted))}
    found = {id_: attached[id_] for id_ in wanted if id_ in attached}
    return list((found | {block.id: block for block in by_words}).values())


_TOOLS: Mapping[str, Callable[[UnitOfWork, BlockToolContext, dict[str, Any]], str]] = MappingProxyType(
    {
        "memory_replace": _replace,
        "memory_insert": _insert,
        "memory_rethink": _rethink,
        "memory_create": _create,
        "archival_insert": _archive,
        "archival_search": _search,
    }
)

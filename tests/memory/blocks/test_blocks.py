"""Blocks in the database: versions, compare-and-set, attachments, and the tools of models."""

from __future__ import annotations

from typing import Any

import pytest

from app.kernel.database import Database
from app.kernel.errors import InvalidInput, NotFound
from app.kernel.sections.blocks import BlockSettings
from app.memory.blocks import storage, tools
from app.memory.blocks.block import (
    BlockAuthor,
    BlockAuthorKind,
    BlockChange,
    BlockChanged,
    BlockScope,
    BlockTarget,
    BlockTargetKind,
    LabelTaken,
    NewBlock,
    TooManyBlocks,
)
from app.memory.blocks.service import Blocks
from app.memory.blocks.storage import BlockFilter
from app.memory.blocks.tools import BlockToolAnswer, BlockToolContext
from app.memory.recall.passages import SourceKind
from app.memory.recall.query import RecallQuery, RecallScope
from app.memory.recall.service import Recall

ANA = BlockTarget(BlockTargetKind.USER, "ana")
EVERYBODY = BlockTarget(BlockTargetKind.NAMESPACE)
CALLER = BlockAuthor(BlockAuthorKind.CALLER, "local")
MODEL = BlockAuthor(BlockAuthorKind.MODEL, "qwen2.5:1.5b", "0199", "answer")
SCOPE = BlockScope("default", user="ana", conversation="conv_1", agent="helper")


@pytest.fixture
def blocks(database: Database) -> Blocks:
    return Blocks(database, BlockSettings(max_attached=3, keep_versions=3))


def use(blocks: Blocks, name: str, scope: BlockScope = SCOPE, **arguments: Any) -> BlockToolAnswer:
    with blocks.database.work() as work:
        return tools.call(work, BlockToolContext(scope, MODEL, blocks.settings), name, arguments)


def test_each_change_is_a_version_with_its_author(blocks: Blocks) -> None:
    made = blocks.create("default", NewBlock("human", "Ana"), CALLER, [ANA]).block
    edited = blocks.edit("default", made.id, BlockChange(value="Ana, 31"), CALLER, expected=1).block
    same = blocks.edit("default", made.id, BlockChange(value="Ana, 31"), CALLER, expected=2).block
    use(blocks, "memory_insert", label="human", new_string="Lives in Vigo.")
    back = blocks.rollback("default", made.id, 1, CALLER, expected=3).block

    assert (edited.version, same.version, back.version, back.value) == (2, 2, 4, "Ana")
    assert [(one.version, one.value, one.author.name, one.operation) for one in blocks.versions(None, made.id)] == [
        (4, "Ana", "local", "rollback to 1"),
        (3, "Ana, 31\nLives in Vigo.", "qwen2.5:1.5b", "memory_insert"),
        (2, "Ana, 31", "local", "edit"),
    ], "only the newest three are kept"
    by_model = blocks.version("default", made.id, 3).author
    assert (by_model.kind, by_model.run_id, by_model.step) == ("model", "0199", "answer")
    with pytest.raises(NotFound, match="no version of the block 'human' '1'"):
        blocks.rollback("default", made.id, 1, CALLER, expected=4)


def test_an_edit_of_an_old_version_is_refused_with_the_current_one(blocks: Blocks) -> None:
    made = blocks.create("default", NewBlock("human", "Ana"), CALLER).block
    blocks.edit("default", made.id, BlockChange(value="first"), CALLER, expected=1)

    with pytest.raises(BlockChanged) as refused:
        blocks.edit("default", made.id, BlockChange(value="second"), CALLER, expected=1)
    assert (refused.value.expected, refused.value.current) == (1, 2)
    assert blocks.get("default", made.id).block.value == "first"


def test_a_value_over_its_limit_is_refused(blocks: Blocks) -> None:
    with pytest.raises(InvalidInput, match="it has 6 characters, 1 more than the limit of the block"):
        NewBlock("human", "abcdef", limit=5)
    made = blocks.create("default", NewBlock("human", "abcde", limit=5), CALLER, [ANA]).block
    with pytest.raises(InvalidInput, match="more than the limit"):
        blocks.edit("default", made.id, BlockChange(limit=4), CALLER, expected=1)
    answer = use(blocks, "memory_insert", label="human", new_string="f")
    assert answer.is_error
    assert "would have 7 characters, 2 more than its limit of 5; shorten the text" in answer.text


def test_blocks_are_shared_and_the_nearest_label_counts(blocks: Blocks) -> None:
    shared = blocks.create("default", NewBlock("rules", "for all"), CALLER, [EVERYBODY]).block
    persona = blocks.create("default", NewBlock("persona", "for all"), CALLER, [EVERYBODY]).block
    own = blocks.create("default", NewBlock("persona", "for ana"), CALLER, [ANA]).block
    blocks.create("other", NewBlock("rules", "elsewhere"), CALLER, [EVERYBODY])

    def seen(scope: BlockScope) -> list[str]:
        return [one.block.id for one in blocks.in_context(scope)]

    assert seen(SCOPE) == [own.id, shared.id]
    assert seen(BlockScope("default", user="ben")) == [persona.id, shared.id]
    with pytest.raises(LabelTaken, match=r"the block block_\w+ with the label 'persona' is attached to the user 'ana'"):
        blocks.attach("default", persona.id, ANA)
    blocks.set_archived("default", own.id, archived=True)
    assert seen(SCOPE) == [persona.id, shared.id]
    blocks.detach("default", persona.id, EVERYBODY)
    assert seen(SCOPE) == [shared.id]


def test_a_target_has_so_many_blocks_at_most(blocks: Blocks) -> None:
    made = [blocks.create("default", NewBlock(label, ""), CALLER, [ANA]).block for label in "abc"]
    with pytest.raises(TooManyBlocks, match="3 blocks in context are attached to the user 'ana'"):
        blocks.create("default", NewBlock("d"), CALLER, [ANA])
    blocks.set_archived("default", made[0].id, archived=True)
    blocks.create("default", NewBlock("d"), CALLER, [ANA])
    with pytest.raises(TooManyBlocks):
        blocks.set_archived("default", made[0].id, archived=False)
    assert len(blocks.page(BlockFilter("default", archived=False, target=ANA)).blocks) == 3


def test_lists_are_filtered_and_have_pages(blocks: Blocks) -> None:
    made = [blocks.create("default", NewBlock(label, f"about {label}"), CALLER).block for label in "abcd"]
    blocks.create("other", NewBlock("a"), CALLER)

    first = blocks.page(BlockFilter("default"), limit=3)
    rest = blocks.page(BlockFilter("default"), after=first.next_cursor, limit=3)
    assert [one.block.label for one in (*first.blocks, *rest.blocks)] == list("dcba")
    assert rest.next_cursor is None
    assert [one.block.id for one in blocks.page(BlockFilter("default", query="ABOUT B")).blocks] == [made[1].id]
    assert [one.block.namespace for one in blocks.page(BlockFilter(None, label="a")).blocks] == ["other", "default"]


def test_a_model_creates_edits_and_archives(blocks: Blocks) -> None:
    assert "was created" in use(blocks, "memory_create", label="Human", description="the user", value="Ana").text
    assert "of 2000 characters are used. It now says:\nAna Ruiz" in (
        use(blocks, "memory_replace", label="human", old_string="Ana", new_string="Ana Ruiz").text
    )
    assert "says this already" in use(blocks, "memory_rethink", label="human", new_memory="Ana Ruiz").text
    created = blocks.in_context(SCOPE)
    assert [(one.block.label, one.target) for one in created] == [("human", ANA)]
    for content in ("The cat is called Pixel.", "The car needs new tyres in March."):
        assert not use(blocks, "archival_insert", content=content).is_error
    assert use(blocks, "archival_search", query="what is my cat's name?").text.endswith("The cat is called Pixel.")
    assert "has nothing about 'boat'" in use(blocks, "archival_search", query="boat").text
    assert "has nothing" in use(blocks, "archival_search", BlockScope("default", user="ben"), query="cat").text
    assert [one.block.label for one in blocks.in_context(SCOPE)] == ["human"]


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("memory_replace", {"label": "nothing", "old_string": "a", "new_string": "b"}, "in context are: human, rules"),
        ("memory_insert", {"label": "rules", "new_string": "b"}, "'rules' is read-only"),
        ("memory_insert", {"label": "human"}, "the argument 'new_string' is missing"),
        ("memory_insert", {"label": "human", "new_string": 5}, "new_string must be a text"),
        ("memory_insert", {"label": "human", "new_string": "a", "line": 1}, "there is no argument 'line'"),
        ("memory_insert", {"label": "human", "new_string": "a\x00"}, "U+0000"),
        ("memory_rethink", {"label": "human", "new_memory": "a" * 20_001}, "at most 20000 are accepted"),
        ("memory_create", {"label": "human", "description": ""}, "there is a memory block 'human' already"),
        ("memory_create", {"label": "no blanks", "description": ""}, "is not a valid label; accepted: lower-case"),
        ("memory_create", {"label": "a", "description": "", "limit": 1e9}, "from 1 to 20000"),
        ("archival_search", {"query": "a", "limit": True}, "limit must be a whole number from 1 to 20"),
        ("archival_insert", {"content": " "}, "content is empty"),
        ("memory_delete", {}, "there is no memory tool 'memory_delete'; there are: memory_replace"),
    ],
)
def test_what_a_model_does_wrong_is_answered_with_what_to_do(
    blocks: Blocks, name: str, arguments: dict[str, Any], says: str
) -> None:
    blocks.create("default", NewBlock("human", "Ana"), CALLER, [ANA])
    blocks.create("default", NewBlock("rules", "be kind", read_only=True), CALLER, [EVERYBODY])
    before = blocks.page(BlockFilter(None))

    answer = use(blocks, name, **arguments)

    assert answer.is_error
    assert says in answer.text
    assert blocks.page(BlockFilter(None)) == before


def recalled(blocks: Blocks, text: str, user: str | None) -> list[str]:
    query = RecallQuery(text, "default", user, RecallScope.SHARED, sources=(SourceKind.BLOCK,))
    return [one.source_id for one in Recall(blocks.database).search(query).passages]


def test_recall_finds_archived_blocks_of_those_they_are_attached_to(blocks: Blocks) -> None:
    made = blocks.create("default", NewBlock("cat", "Pixel sleeps all day."), CALLER, [ANA]).block
    assert recalled(blocks, "pixel", "ana") == [], "what is in context is not searched"

    blocks.set_archived("default", made.id, archived=True)
    assert recalled(blocks, "pixel", "ana") == [made.id]
    assert recalled(blocks, "pixel", "ben") == recalled(blocks, "pixel", None) == []
    blocks.edit("default", made.id, BlockChange(value="Luna sleeps all day."), CALLER, expected=1)
    blocks.attach("default", made.id, EVERYBODY)
    assert recalled(blocks, "pixel", "ana") == []
    assert recalled(blocks, "luna", "ben") == [made.id]
    blocks.detach("default", made.id, EVERYBODY)
    assert recalled(blocks, "luna", "ben") == []
    blocks.set_archived("default", made.id, archived=False)
    assert recalled(blocks, "luna", "ana") == []


def test_archival_search_takes_what_recall_found_first(blocks: Blocks) -> None:
    for content in ("The cat is called Pixel.", "The cat food is in the cellar.", "Pixel is a tabby."):
        use(blocks, "archival_insert", content=content)
    by_id = {one.block.value: one.block.id for one in blocks.page(BlockFilter("default")).blocks}
    query = tools.recall_query(SCOPE, "archival_search", {"query": "tabby"})
    assert query is not None
    found = Recall(blocks.database).search(query)
    assert [one.source_id for one in found.passages] == [by_id["Pixel is a tabby."]]
    with blocks.database.work() as work:
        context = BlockToolContext(SCOPE, MODEL, blocks.settings, found)
        answer = tools.call(work, context, "archival_search", {"query": "cat"}).text
        other = BlockToolContext(BlockScope("default", user="ben"), MODEL, blocks.settings, found)
        nothing = tools.call(work, other, "archival_search", {"query": "cat"}).text
    assert answer.split("\n")[1].endswith("Pixel is a tabby.")
    assert len(answer.split("\n")) == 4
    assert "has nothing" in nothing


def test_what_is_deleted_with_a_user_is_found_by_nobody(blocks: Blocks) -> None:
    own = blocks.create("default", NewBlock("cat", "Pixel"), CALLER, [ANA]).block
    shared = blocks.create("default", NewBlock("dog", "Pixel too"), CALLER, [ANA, EVERYBODY]).block
    for one in (own, shared):
        blocks.set_archived("default", one.id, archived=True)

    with blocks.database.work() as work:
        assert storage.delete_of_in(work, "default", ANA) == [own.id]

    assert recalled(blocks, "pixel", "ana") == [shared.id]
    assert [one.block.id for one in blocks.page(BlockFilter("default")).blocks] == [shared.id]
    assert blocks.get("default", shared.id).targets == (EVERYBODY,)

"""
The sources of what a prompt has beside its conversation: memory blocks, personal context, recalled texts.

A source that finds nothing gives an empty part. A source that fails gives none, and the reason is reported: a prompt
without what was said long ago is better than no answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, zip_longest
from typing import Any
from uuid import UUID

from app.kernel import log
from app.kernel.database import Database
from app.kernel.errors import ArrieroError, DatabaseUnreachable
from app.memory.assembly import rendering
from app.memory.assembly.parts import PromptCandidate, PromptPart
from app.memory.blocks import rendering as block_rendering
from app.memory.blocks import storage as block_storage
from app.memory.blocks.block import Block, BlockScope
from app.memory.conversations.service import shown_conversation
from app.memory.personal.relevant import ContextPart, relevant
from app.memory.personal.storage import ContextOwner
from app.memory.recall import word_plan
from app.memory.recall.passages import SourceKind
from app.memory.recall.query import RecalledPassage, RecallQuery, RecallScope
from app.memory.recall.service import Recall
from app.workflows.language.memory_options import MemoryOptions
from workers.engine import Engine

_log = log.get(__name__)

#: Most passages that one search returns, and most parts of documents that it finds.
_PASSAGES, _DOCUMENTS = 12, 4
#: A passage is relevant with such a share of the score of the best one, and with such a share of the words of the query
#: or such a cosine.
_OF_BEST, _MATCHED, _SIMILAR = 0.5, 0.4, 0.5


@dataclass(frozen=True, slots=True)
class Sought:
    """For whom and for what something is looked for."""

    namespace: str
    user: str | None
    conversation: UUID | None
    #: The text that recalled texts and documents should have to do with; may be empty.
    query: str
    options: MemoryOptions


@dataclass(frozen=True, slots=True)
class FoundParts:
    """What the sources found, counted, the best first."""

    parts: dict[PromptPart, tuple[PromptCandidate, ...]] = field(default_factory=dict)
    #: What did not work.
    problems: tuple[str, ...] = ()


def find(database: Database, recall: Recall, engine: Engine, sought: Sought, before: int | None) -> FoundParts:
    """Return what there is. `before` is the place at which the window of the conversation begins, if known."""
    sources: Mapping[PromptPart, Callable[[], list[PromptCandidate] | None]] = {
        PromptPart.BLOCKS: partial(_blocks, database, sought),
        PromptPart.PERSONAL: partial(_documents, database, recall, sought),
        PromptPart.RECALLED: partial(_recalled, recall, sought, before),
    }
    parts: dict[PromptPart, tuple[PromptCandidate, ...]] = {}
    problems: list[str] = []
    for part, source in sources.items():
        if getattr(sought.options, part.value) == 0:
            continue
        try:
            found = source()
        except DatabaseUnreachable:
            raise
        except ArrieroError as error:
            _log.warning("prompt_source_failed", part=part.value, error=str(error))
            problems.append(f"{part.value}: {error}")
            continue
        if found is not None:
            parts[part] = _counted(engine, found)
    return FoundParts(parts, tuple(problems))


def recalled(recall: Recall, engine: Engine, sought: Sought, before: int) -> tuple[PromptCandidate, ...]:
    """Return what is recalled for a window that begins at the place `before`."""
    return _counted(engine, _recalled(recall, sought, before) or [])


def _recalled(recall: Recall, sought: Sought, before: int | None) -> list[PromptCandidate] | None:
    """What was said outside the window, and memories; None when nothing is looked for."""
    if not sought.query.strip():
        return None
    terms = len(word_plan.query_terms(sought.query))
    ranked = [_relevant(recall.search(query).passages, terms) for query in _queries(sought, before)]
    own = None if sought.conversation is None else shown_conversation(sought.conversation)
    merged = {one.id: one for one in chain.from_iterable(zip_longest(*ranked)) if one is not None}
    return [_passage(one, own) for one in merged.values()]


def _queries(sought: Sought, before: int | None) -> Iterator[RecallQuery]:
    """What was said in this conversation before its window; and what the user has beside it, or the namespace."""
    if sought.conversation is not None:
        shown = shown_conversation(sought.conversation)
        yield RecallQuery(
            sought.query,
            sought.namespace,
            sought.user,
            limit=_PASSAGES,
            sources=(SourceKind.MESSAGE,),
            conversations=(shown,),
            scope=RecallScope.ALL,
            outside=None if before is None else (shown, before),
        )
    own = (SourceKind.MEMORY, SourceKind.MESSAGE) if sought.user is not None else (SourceKind.MEMORY,)
    outside = None if sought.conversation is None else (shown_conversation(sought.conversation), 1)
    yield RecallQuery(sought.query, sought.namespace, sought.user, limit=_PASSAGES, sources=own, outside=outside)


def _relevant(passages: Sequence[RecalledPassage], terms: int) -> list[RecalledPassage]:
    """The passages that have enough to do with a query of so many terms: each costs tokens that are computed anew."""
    best = max((one.score for one in passages), default=0.0)
    return [
        one
        for one in passages
        if one.score >= _OF_BEST * best
        and (len(one.matched) >= _MATCHED * terms or (one.scores.dense or 0.0) >= _SIMILAR)
    ]


def _blocks(database: Database, sought: Sought) -> list[PromptCandidate]:
    conversation = None if sought.conversation is None else shown_conversation(sought.conversation)
    with database.work() as work:
        found = block_storage.in_context_in(work, BlockScope(sought.namespace, sought.user, conversation))
    return [PromptCandidate(one.block.id, _inside(one.block), 0, {"label": one.block.label}) for one in found]


def _inside(block: Block) -> str:
    """A block as it stands between the marks of all blocks."""
    return block_rendering.render([block]).removeprefix(rendering.BLOCKS_OPEN).removesuffix(rendering.BLOCKS_CLOSE)


def _documents(database: Database, recall: Recall, sought: Sought) -> list[PromptCandidate]:
    """The parts of documents that each prompt has, and those that have to do with the query."""
    found = relevant(database, recall, ContextOwner(sought.namespace, sought.user), sought.query, _DOCUMENTS).parts
    best = max((part.score for part in found if part.score is not None), default=0.0)
    return [
        PromptCandidate(f"{part.document_id}/{part.section}", f"{part.heading}: {part.text}", 0, _about(part))
        for part in found
        if part.score is None or part.score >= _OF_BEST * best
    ]


def _about(part: ContextPart) -> dict[str, Any]:
    score = {} if part.score is None else {"score": part.score}
    return {"kind": part.kind.value, "name": part.name, **score}


def _passage(one: RecalledPassage, own: str | None) -> PromptCandidate:
    who = one.speaker or one.role or one.kind or one.source
    about = {"source": one.source, "source_id": one.source_id, "score": round(one.score, 4)}
    place = one.position if own is not None and one.conversation == own and one.source == SourceKind.MESSAGE else None
    return PromptCandidate(str(one.id), f"[{one.at:%Y-%m-%d} {who}] {one.text}", 0, about, place)


def _counted(engine: Engine, candidates: Sequence[PromptCandidate]) -> tuple[PromptCandidate, ...]:
    """The candidates with their tokens, and one for the mark before each."""
    counts = engine.count_texts([one.text for one in candidates])
    return tuple(
        PromptCandidate(one.id, one.text, count + 2, one.about, one.seq)
        for one, count in zip(candidates, counts, strict=True)
    )

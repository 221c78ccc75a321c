"""
The sources of what a prompt has beside its conversation: memory blocks, personal context, recalled texts.

A source that finds nothing gives an empty part. A source that fails gives none, and the reason is reported: a prompt
without what was said long ago is better than no answer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, zip_longest
from uuid import UUID

from app.kernel import log
from app.kernel.database import Database
from app.kernel.errors import ArrieroError, DatabaseUnreachable
from app.memory.assembly import rendering
from app.memory.assembly.parts import Candidate, PromptPart
from app.memory.blocks import rendering as block_rendering
from app.memory.blocks import storage as block_storage
from app.memory.blocks.block import Block, BlockScope
from app.memory.conversations.service import shown_conversation
from app.memory.personal import storage as personal_storage
from app.memory.personal.storage import ContextOwner
from app.memory.recall.passages import SourceKind
from app.memory.recall.query import RecalledPassage, RecallQuery, RecallScope
from app.memory.recall.service import Recall
from app.workflows.language.memory_options import MemoryOptions
from workers.engine import Engine

_log = log.get(__name__)

#: Most passages that one search returns, and most documents that are always in the prompt.
_PASSAGES, _DOCUMENTS = 12, 20


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

    parts: dict[PromptPart, tuple[Candidate, ...]] = field(default_factory=dict)
    #: What did not work.
    problems: tuple[str, ...] = ()


class PromptSources:
    """The sources of one process. Safe from any thread."""

    def __init__(self) -> None:
        self._recall: Recall | None = None
        self._lock = threading.Lock()

    def find(self, database: Database, engine: Engine, sought: Sought, before: int | None) -> FoundParts:
        """Return what there is. `before` is the place at which the window of the conversation begins, if known."""
        parts: dict[PromptPart, tuple[Candidate, ...]] = {}
        problems: list[str] = []
        sources: Mapping[PromptPart, Callable[[], list[Candidate] | None]] = {
            PromptPart.BLOCKS: partial(_blocks, database, sought),
            PromptPart.PERSONAL: partial(_documents, database, sought),
            PromptPart.RECALLED: partial(self._recalled, database, sought, before),
        }
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

    def recalled(self, database: Database, engine: Engine, sought: Sought, before: int) -> tuple[Candidate, ...]:
        """Return what is recalled for a window that begins at the place `before`."""
        return _counted(engine, self._recalled(database, sought, before) or [])

    def _recalled(self, database: Database, sought: Sought, before: int | None) -> list[Candidate] | None:
        """What was said outside the window, and memories; None when nothing is looked for."""
        if not sought.query.strip():
            return None
        with self._lock:
            recall = self._recall = self._recall or Recall(database)
        ranked = [recall.search(query).passages for query in _queries(sought, before)]
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


def _blocks(database: Database, sought: Sought) -> list[Candidate]:
    conversation = None if sought.conversation is None else shown_conversation(sought.conversation)
    with database.work() as work:
        found = block_storage.in_context_in(work, BlockScope(sought.namespace, sought.user, conversation))
    return [Candidate(one.block.id, _inside(one.block), 0, {"label": one.block.label}) for one in found]


def _inside(block: Block) -> str:
    """A block as it stands between the marks of all blocks."""
    return block_rendering.render([block]).removeprefix(rendering.BLOCKS_OPEN).removesuffix(rendering.BLOCKS_CLOSE)


def _documents(database: Database, sought: Sought) -> list[Candidate]:
    with database.work() as work:
        found = personal_storage.always_in(work, ContextOwner(sought.namespace, sought.user), _DOCUMENTS)
    return [
        Candidate(one.id, f"{one.title}: {one.content}", 0, {"kind": str(one.kind), "name": one.name}) for one in found
    ]


def _passage(one: RecalledPassage, own: str | None) -> Candidate:
    who = one.speaker or one.role or one.kind or one.source
    about = {"source": one.source, "source_id": one.source_id, "score": round(one.score, 4)}
    place = one.position if own is not None and one.conversation == own and one.source == SourceKind.MESSAGE else None
    return Candidate(str(one.id), f"[{one.at:%Y-%m-%d} {who}] {one.text}", 0, about, place)


def _counted(engine: Engine, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The candidates with their tokens, and one for the mark before each."""
    counts = engine.count_texts([one.text for one in candidates])
    return tuple(
        Candidate(one.id, one.text, count + 2, one.about, one.seq)
        for one, count in zip(candidates, counts, strict=True)
    )

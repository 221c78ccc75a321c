"""
The parts of the personal context that a prompt contains: documents that are always in it, and what recall found.

Each part has the id of its document, and what was found has its score, so that a run can say what its prompt had.
A user's prompt has parts of the user's documents and of those of the whole namespace, and of nobody else's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from app.kernel.database import Database
from app.memory.personal import document as documents
from app.memory.personal import storage
from app.memory.personal.document import ContextDocument, ContextKind
from app.memory.personal.storage import ContextOwner
from app.memory.recall.passages import SourceKind
from app.memory.recall.query import Recalled, RecalledPassage, RecallQuery, RecallScope
from app.memory.recall.service import Recall

#: Most documents that are always in a prompt, and most parts of them together.
_MOST_ALWAYS, MOST_ALWAYS_PARTS = 20, 100


@dataclass(frozen=True, slots=True)
class ContextPart:
    """A part of a document, for a prompt."""

    document_id: str
    kind: ContextKind
    name: str
    #: The title of the document and the headings above the part.
    heading: str
    text: str
    #: The place of its section in the document, from 0.
    section: int
    #: By recall; None for a part of a document that is always in the prompt.
    score: float | None


@dataclass(frozen=True, slots=True)
class RelevantContext:
    """Parts for a prompt: first those of documents that are always in it, then the others, the best first."""

    parts: tuple[ContextPart, ...]
    #: How the others were found; None without a query.
    recalled: Recalled | None


def recall_query(owner: ContextOwner, query: str, limit: int) -> RecallQuery:
    """Return what is asked of recall."""
    sources = (SourceKind.DOCUMENT,)
    return RecallQuery(query, owner.namespace, owner.user, RecallScope.SHARED, limit=limit, sources=sources)


def relevant(database: Database, recall: Recall, owner: ContextOwner, query: str, limit: int = 8) -> RelevantContext:
    """
    Return the parts for a prompt about something: at most `limit` that recall found.

    With an empty query, only documents that are always in prompts have parts. Raises DatabaseUnreachable.
    """
    # Some of what is found may be in the prompt already.
    recalled = recall.search(recall_query(owner, query, limit + MOST_ALWAYS_PARTS)) if query.strip() else None
    with database.work() as work:
        always = storage.always_in(work, owner, _MOST_ALWAYS)
        ids = {document.id for document in always}
        passages = [] if recalled is None else [one for one in recalled.passages if one.source_id not in ids][:limit]
        found = {one.id: one for one in storage.of_ids_in(work, owner, [one.source_id for one in passages])}
    parts = [part for document in always for part in _of_document(document)][:MOST_ALWAYS_PARTS]
    parts += [_of_passage(found[one.source_id], one) for one in passages if one.source_id in found]
    return RelevantContext(tuple(parts), recalled)


def render(parts: Sequence[ContextPart]) -> str:
    """Return parts as a text for a prompt; an empty text when there are none."""
    if not parts:
        return ""
    lines = [f"[{part.kind}: {part.heading}]\n{part.text}" for part in parts]
    return "\n\n".join(lines)


def _of_document(document: ContextDocument) -> list[ContextPart]:
    return [
        ContextPart(document.id, document.kind, document.name, one.heading, one.text, one.number, None)
        for one in documents.sections(document)
    ]


def _of_passage(document: ContextDocument, passage: RecalledPassage) -> ContextPart:
    heading = passage.speaker or document.title
    score = round(passage.score, 6)
    return ContextPart(document.id, document.kind, document.name, heading, passage.text, passage.position, score)

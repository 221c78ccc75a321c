"""Documents as passages, so that recall finds their sections."""

from __future__ import annotations

from collections.abc import Sequence

from app.kernel.database import UnitOfWork
from app.memory.personal.document import ContextDocument, sections
from app.memory.recall.passages import NewPassage, SourceKind
from app.memory.recall.storage import put_in, remove_in

#: Most characters of the headings that are kept with a passage.
_MAX_HEADING = 200


def index_in(work: UnitOfWork, document: ContextDocument) -> None:
    """Write the passages of a document, in the place of earlier ones."""
    # The headings take the place of a speaker: each part of a long section is found by them, too.
    put_in(
        work,
        [
            NewPassage(
                namespace=document.namespace,
                source=SourceKind.DOCUMENT,
                source_id=document.id,
                text=section.text,
                user=document.user,
                position=section.number,
                speaker=section.heading[:_MAX_HEADING],
                kind=document.kind,
                at=document.updated_at,
            )
            for section in sections(document)
        ],
    )


def forget_in(work: UnitOfWork, namespace: str, document_ids: Sequence[str]) -> None:
    """Remove the passages of deleted documents."""
    if document_ids:
        remove_in(work, namespace, SourceKind.DOCUMENT, document_ids)

"""What clients do with stored documents of the personal context: one call, one transaction."""

from __future__ import annotations

from dataclasses import dataclass

from app.kernel.database import Database
from app.memory.personal import storage
from app.memory.personal.document import ContextDocument, ContextKind
from app.memory.personal.storage import ContextOwner


@dataclass(frozen=True, slots=True)
class DocumentPage:
    """A part of the list of documents, without their contents."""

    documents: list[ContextDocument]
    #: The id after which the next page begins; None on the last page.
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class PersonalContext:
    """The documents of all namespaces."""

    database: Database

    def get(self, owner: ContextOwner, kind: ContextKind, name: str) -> ContextDocument:
        """Return a document. Raises NotFound."""
        with self.database.work() as work:
            return storage.get_in(work, owner, kind, name)

    def page(
        self,
        namespace: str | None,
        *,
        user: str | None = None,
        of_namespace: bool = False,
        kind: ContextKind | None = None,
        after: str | None = None,
        limit: int = 100,
    ) -> DocumentPage:
        """Return documents in the order in which they were created, without their contents."""
        with self.database.work() as work:
            found = storage.list_in(
                *(work, namespace), user=user, of_namespace=of_namespace, kind=kind, after=after, limit=limit + 1
            )
        return DocumentPage(found[:limit], found[limit - 1].id if len(found) > limit else None)

    def delete(self, owner: ContextOwner, kind: ContextKind, name: str) -> None:
        """Delete a document. Raises NotFound, DocumentOfFolder."""
        with self.database.work() as work:
            document = storage.get_in(work, owner, kind, name, hold=True)
            storage.require_api(document)
            storage.delete_in(work, document)

"""Graphs of stored definitions, cached per process: a definition never changes."""

from __future__ import annotations

from app.kernel.database import UnitOfWork
from app.workflows.language import definition as definitions
from app.workflows.language.graph import Graph
from app.workflows.runs.storage import store

_MAX_CACHED = 256
_CACHE: dict[str, Graph] = {}


def of(work: UnitOfWork, sha256: str) -> Graph:
    """The graph of the definition of that hash."""
    found = _CACHE.get(sha256)
    if found is None:
        if len(_CACHE) >= _MAX_CACHED:
            _CACHE.clear()
        found = _CACHE[sha256] = Graph(definitions.from_document(store.document(work, sha256)))
    return found

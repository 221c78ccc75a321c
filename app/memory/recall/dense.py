"""
The search by meaning: the passages whose vectors are nearest to that of the query.

In a small scope all vectors are compared. In a large one the HNSW index of the model finds them; it is scanned until
enough of what it finds belongs to the scope. Passages that were found by words are compared in any case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from sqlalchemy import TextClause, text

from app.kernel.database import Database, UnitOfWork
from app.memory.recall.lexical import ScopeSize
from app.memory.recall.query import QueryVectors, RecallQuery, SearchLeg
from app.memory.recall.scopes import CONDITIONS, parameters

#: Passages that are returned.
MOST_NEAREST = 100
#: Nodes of the index that a scan keeps at least, and tuples after which it ends.
_EF_SEARCH, _MOST_SCANNED = 100, 40_000
#: Passages of a scope up to which all vectors are compared although there is an index.
_COMPARED = 12_000
#: What reading a vector through the index costs, as vectors that are compared one after the other.
_INDEX_COST = 8

# Of the files of one model only the present one: the vector of a query is of that file.
_MODELS = text("""
    SELECT id, name, dimensions, is_indexed, made FROM (
        SELECT DISTINCT ON (split_part(name, '@', 1))
               id, split_part(name, '@', 1) AS name, state, dimensions, is_indexed, made
        FROM recall_model ORDER BY split_part(name, '@', 1), state = 'retired', id DESC
    ) AS present
    WHERE dimensions IS NOT NULL AND state IN ('building', 'ready', 'retired')
    ORDER BY state = 'ready' DESC, state = 'building' DESC, id DESC LIMIT 2
""")
_SETTINGS = tuple(
    text(f"SET LOCAL {setting}")
    for setting in (
        f"hnsw.ef_search = {_EF_SEARCH}",
        "hnsw.iterative_scan = relaxed_order",
        f"hnsw.max_scan_tuples = {_MOST_SCANNED}",
        # The order of the index is the order that is wanted; nothing is to be read as a whole and sorted.
        "enable_hashjoin = off",
        "enable_mergejoin = off",
        "enable_sort = off",
        "enable_seqscan = off",
    )
)
_EXACT = text(f"""
    SELECT vector.passage_id AS id, -(vector.vector <#> CAST(:vector AS halfvec)) AS cosine
    FROM passage JOIN passage_vector AS vector ON vector.passage_id = passage.id AND vector.model_id = :model
    WHERE {CONDITIONS} ORDER BY vector.vector <#> CAST(:vector AS halfvec) LIMIT :most
""")
_OF = text("""
    SELECT passage_id AS id, -(vector <#> CAST(:vector AS halfvec)) AS cosine FROM passage_vector
    WHERE model_id = :model AND passage_id = ANY(:ids)
""")


@dataclass(frozen=True, slots=True)
class VectorMatches:
    """What a search by meaning has found: cosines by the ids of passages, for each model, the preferred one first."""

    cosines: tuple[tuple[str, Mapping[int, float]], ...]
    leg: SearchLeg


def models_of(database: Database) -> list[str]:
    """Return the names of the models that have made vectors: one, or two while passages are embedded anew."""
    with database.work() as work:
        return [row.name for row in work.rows(_MODELS)]


def literal(vector: Sequence[float]) -> str:
    """Return a vector as text for Postgres."""
    return f"[{','.join(f'{value:.6g}' for value in vector)}]"


def search(
    work: UnitOfWork, query: RecallQuery, size: ScopeSize, vectors: QueryVectors, also: Sequence[int]
) -> VectorMatches:
    """Return the nearest passages of a scope, and the cosines of those that were found by words (`also`)."""
    if not vectors.vectors:
        return VectorMatches((), SearchLeg(used=False, reason=vectors.reason))
    found, methods = [], set()
    for model in work.rows(_MODELS):
        vector = vectors.vectors.get(model.name)
        if vector is None or len(vector) != model.dimensions:
            continue
        values = {**parameters(query), "vector": literal(vector), "model": model.id, "most": MOST_NEAREST}
        if not model.is_indexed or _is_compared(size.passages, model.made):
            rows = work.rows(_EXACT, values)
            methods.add("exact")
        else:
            for setting in _SETTINGS:
                work.execute(setting)
            rows = work.rows(_nearest(model.id, model.dimensions), values)
            methods.add("index")
        cosines = {row.id: float(row.cosine) for row in rows}
        others = [id_ for id_ in also if id_ not in cosines]
        if others:
            rows = work.rows(_OF, {"vector": values["vector"], "model": model.id, "ids": others})
            cosines |= {row.id: float(row.cosine) for row in rows}
        found.append((model.name, cosines))
    if not found:
        return VectorMatches((), SearchLeg(used=False, reason="the vector of the query is of another model"))
    leg = SearchLeg(
        used=True,
        reason=vectors.reason,
        method="index" if "index" in methods else "exact",
        candidates=sum(len(cosines) for _, cosines in found),
        models=tuple(name for name, _ in found),
    )
    return VectorMatches(tuple(found), leg)


def _is_compared(passages: int, vectors: int) -> bool:
    """Whether comparing all vectors of a scope costs less than scanning the index until enough of it was found."""
    return passages <= _COMPARED or passages <= _INDEX_COST * MOST_NEAREST * vectors / passages


@lru_cache(maxsize=64)
def _nearest(model_id: int, dimensions: int) -> TextClause:
    """Return the statement that uses the index of a model: its condition and its expression are those of the index."""
    nearness = f"CAST(vector.vector AS halfvec({dimensions})) <#> CAST(:vector AS halfvec({dimensions}))"
    return text(f"""
        SELECT vector.passage_id AS id, -({nearness}) AS cosine
        FROM passage_vector AS vector JOIN passage ON passage.id = vector.passage_id
        WHERE vector.model_id = {model_id} AND {CONDITIONS} ORDER BY {nearness} LIMIT :most
    """)

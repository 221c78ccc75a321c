"""
Recall: what was said, found by words and by meaning.

`search` is one read of the database. The vector of the query comes from an embedding model, in a bounded time; without
it, passages are found by their words, and the answer says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Protocol

from sqlalchemy import text

from app.kernel.database import Database, UnitOfWork
from app.memory.recall import dense, lexical, ranking, word_plan
from app.memory.recall.dense import VectorMatches
from app.memory.recall.lexical import ScopeSize, WordFrequencies, WordMatches
from app.memory.recall.passages import embedded_text, terms_of
from app.memory.recall.query import (
    PassageScores,
    QueryVectors,
    Recalled,
    RecalledPassage,
    RecallMode,
    RecallQuery,
    SearchLeg,
)
from app.memory.recall.scopes import CONDITIONS, PART_BITS, parameters


class EmbedsQueries(Protocol):
    """Makes the vectors of queries in a bounded time: `QueryEmbedder`, or a benchmark's own."""

    def __call__(self, text: str, models: Sequence[str], /) -> QueryVectors:
        """Return the vectors of a text by these models, or the reason for none."""

    def take_note(self, slug: str, /) -> bool:
        """Whether a query needed this model and no pool took the request. The note is taken away."""

    def close(self) -> None:
        """Close the connections."""


#: The best passages of which neighbours are looked at.
_MOST_WITH_NEIGHBOURS = 60
#: The best passages whose names are searched, too.
_BRIDGES = 5

_TEXTS = text("SELECT text FROM passage WHERE id = ANY(:ids)")
_NOW = text("SELECT now() AS now")
_TIMES = text("SELECT id, at FROM passage WHERE id = ANY(:ids)")
# The next passage on either side, if it is in the scope of the query too.
_NEIGHBOURS = text(f"""
    SELECT one.id AS one, other.id AS other FROM passage AS one CROSS JOIN LATERAL (
        (SELECT passage.id FROM passage WHERE thread = one.thread AND place > one.place AND {CONDITIONS}
         ORDER BY place LIMIT 1)
        UNION ALL
        (SELECT passage.id FROM passage WHERE thread = one.thread AND place < one.place AND {CONDITIONS}
         ORDER BY place DESC LIMIT 1)
    ) AS other
    WHERE one.id = ANY(:ids)
""")
_READ = text("""
    SELECT id, source, source_id, part, text, owner, conversation, place, role, speaker, kind, at FROM passage
    WHERE id = ANY(:ids)
""")


class Recall:
    """The search of one process. Safe for threads."""

    def __init__(self, database: Database, embed: EmbedsQueries | None = None) -> None:
        """Without `embed`, passages are found by their words alone."""
        self._database, self._embed = database, embed
        self._frequencies = WordFrequencies()

    def search(self, query: RecallQuery) -> Recalled:
        """Return the passages that have most to do with a query. Raises DatabaseUnreachable."""
        vectors = self._vectors(query)
        with self._database.work() as work:
            work.execute(lexical.CUSTOM_PLANS)
            size = lexical.scope_size(work, query)
            by_words = WordMatches({}, SearchLeg(used=False, reason="not asked for"))
            if query.mode is not RecallMode.DENSE:
                by_words = lexical.search(work, query, size, self._frequencies)
            by_meaning = dense.search(work, query, size, vectors, tuple(by_words.scores))
            scores = ranking.combined(by_words.scores, [cosines for _, cosines in by_meaning.cosines])
            if by_words.leg.used and by_meaning.leg.used:
                scores = ranking.bridged(scores, _by_names(work, query, size, self._frequencies, scores))
            return _answer(work, query, by_words, by_meaning, scores)

    def take_note(self, slug: str) -> bool:
        """Whether a query needed this model and no pool took its request. The note is taken away."""
        return self._embed is not None and self._embed.take_note(slug)

    def close(self) -> None:
        """Close the connections for vectors of queries."""
        if self._embed is not None:
            self._embed.close()

    def _vectors(self, query: RecallQuery) -> QueryVectors:
        if query.mode is RecallMode.LEXICAL:
            return QueryVectors(reason="not asked for")
        if self._embed is None:
            return QueryVectors(reason="no embedding model is configured")
        models = dense.models_of(self._database)
        if not models:
            return QueryVectors(reason="no passage has a vector yet; see: arriero recall --status")
        return self._embed(query.text, models)


def _by_names(
    work: UnitOfWork,
    query: RecallQuery,
    size: ScopeSize,
    frequencies: WordFrequencies,
    scores: Mapping[int, float],
) -> Mapping[int, float]:
    """Return what the names in the best passages find."""
    best = sorted(scores, key=lambda id_: -scores[id_])[:_BRIDGES]
    texts = [row.text for row in work.rows(_TEXTS, {"ids": best})] if best else []
    names = word_plan.names_in(texts, set(word_plan.query_terms(query.text)))
    return lexical.search(work, replace(query, text=" ".join(names)), size, frequencies).scores if names else {}


def _answer(
    work: UnitOfWork,
    query: RecallQuery,
    by_words: WordMatches,
    by_meaning: VectorMatches,
    scores: Mapping[int, float],
) -> Recalled:
    best = sorted(scores, key=lambda id_: -scores[id_])[:_MOST_WITH_NEIGHBOURS]
    pairs = _pairs(work, query, best) if query.neighbours else []
    times: dict[int, datetime] = {}
    if query.half_life is not None:
        ids = list({*scores, *(other for _, other in pairs)})
        times = {row.id: row.at for row in work.rows(_TIMES, {"ids": ids})}
    now_row = work.row(_NOW)
    assert now_row is not None, "there is a row"
    ranked = ranking.ranked(scores, pairs, times, now_row.now, query.half_life)[: query.limit]
    rows = {row.id: row for row in work.rows(_READ, {"ids": [one.id for one in ranked]})}
    cosines = {id_: value for _, of in reversed(by_meaning.cosines) for id_, value in of.items()}
    wanted = set(word_plan.query_terms(query.text)) if by_words.leg.used else set()
    passages = tuple(
        _recalled(rows[one.id], one, by_words.scores.get(one.id), cosines.get(one.id), wanted)
        for one in ranked
        if one.id in rows
    )
    return Recalled(passages, by_words.leg, by_meaning.leg)


def _pairs(work: UnitOfWork, query: RecallQuery, ids: list[int]) -> list[tuple[int, int]]:
    if not ids:
        return []
    return [(row.one, row.other) for row in work.rows(_NEIGHBOURS, {**parameters(query), "ids": ids})]


def _recalled(
    row: Any, one: ranking.RankedPassage, score: float | None, cosine: float | None, wanted: set[str]
) -> RecalledPassage:
    return RecalledPassage(
        id=row.id,
        source=row.source,
        source_id=row.source_id,
        part=row.part,
        text=row.text,
        user=row.owner or None,
        conversation=row.conversation,
        position=row.place >> PART_BITS,
        role=row.role,
        speaker=row.speaker,
        kind=row.kind,
        at=row.at,
        score=one.score,
        scores=PassageScores(score, cosine, one.neighbours, one.decay),
        matched=tuple(sorted(wanted.intersection(terms_of(embedded_text(row.text, row.speaker))))),
    )

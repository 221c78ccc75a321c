"""
The search by words.

BM25 over the words of the query, among passages that the index of words finds. In a small scope these are all that have
a word of the query. In a large one they are those that have its rare words, and pairs of its frequent ones: passages
that have nothing but a frequent word would hardly rank, and reading them all would take long.
How many passages have a word is known from Postgres' statistics where that is many, and counted otherwise.
Postgres' own rank of a text knows no frequencies of words, and `websearch_to_tsquery` wants all words at once; so
neither is used. `ts_rank` of a single word is: it grows with its occurrences.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sqlalchemy import TextClause, text

from app.kernel.database import UnitOfWork
from app.memory.recall import word_plan
from app.memory.recall.passages import quoted
from app.memory.recall.query import RecallQuery, SearchLeg
from app.memory.recall.scopes import CONDITIONS, parameters, scope_query

#: Passages up to which all of a scope are searched.
EXACT_LIMIT = 5_000
#: Most passages that are scored, and most that are returned.
MOST_SCORED, MOST_RETURNED = 3_000, 200
#: BM25's parameters.
_K1, _B = 1.2, 0.6
#: `ts_rank` of a word that occurs once.
_ONCE = 0.06079271
#: Seconds for which frequencies are kept.
_KEPT = 60.0

_COUNT = text(
    f"SELECT count(*) AS count FROM (SELECT FROM passage WHERE {CONDITIONS} LIMIT {EXACT_LIMIT + 1}) AS within"
)
_ESTIMATE = text(f"EXPLAIN (FORMAT JSON) SELECT FROM passage WHERE {CONDITIONS}")
_FREQUENCIES = text("""
    SELECT most_common_elems::text::text[] AS words, most_common_elem_freqs AS shares FROM pg_stats
    WHERE schemaname = current_schema() AND tablename = 'passage' AND attname = 'lexemes'
""")
# The plan depends on the values: how many passages have a word, and how many there are in the scope.
CUSTOM_PLANS = text("SET LOCAL plan_cache_mode = force_custom_plan")


@dataclass(frozen=True, slots=True)
class ScopeSize:
    """How many passages a query looks at."""

    passages: int
    #: Whether they were counted; otherwise it is the planner's estimate.
    is_exact: bool


@dataclass(frozen=True, slots=True)
class WordMatches:
    """What a search by words has found: scores by the ids of passages."""

    scores: Mapping[int, float]
    leg: SearchLeg


class WordFrequencies:
    """Which share of all passages has each frequent word, from Postgres' statistics. Safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._shares: Mapping[str, float] = {}
        #: Words that are not known are in a smaller share than this.
        self.floor = 0.0

    def current(self, work: UnitOfWork) -> Mapping[str, float]:
        """Return the shares by word; none before the first ANALYZE."""
        with self._lock:
            if time.monotonic() - self._read_at > _KEPT:
                row = work.row(_FREQUENCIES)
                self._shares = {}
                self.floor = 0.0
                if row is not None and row.words:
                    self._shares = dict(zip(row.words, row.shares, strict=False))
                    self.floor = min(self._shares.values())
                self._read_at = time.monotonic()
            return self._shares


def scope_size(work: UnitOfWork, query: RecallQuery) -> ScopeSize:
    """Return how many passages a query looks at: counted up to `EXACT_LIMIT`."""
    row = work.row(_COUNT, parameters(query))
    assert row is not None, "a count has a row"
    if row.count <= EXACT_LIMIT:
        return ScopeSize(row.count, is_exact=True)
    plan: Any = work.rows(_ESTIMATE, parameters(query))[0][0]
    document = json.loads(plan) if isinstance(plan, str) else plan
    return ScopeSize(max(EXACT_LIMIT + 1, int(document[0]["Plan"]["Plan Rows"])), is_exact=False)


def search(work: UnitOfWork, query: RecallQuery, size: ScopeSize, frequencies: WordFrequencies) -> WordMatches:
    """Return the passages of a scope with the best scores."""
    shares = {} if size.is_exact else frequencies.current(work)
    terms = word_plan.rarest(word_plan.query_terms(query.text), shares)
    if not terms:
        return WordMatches({}, SearchLeg(used=False, reason="the query has no words"))
    condition = word_plan.any_of(terms)
    if not size.is_exact:
        condition = word_plan.chosen(terms, shares, frequencies.floor, size.passages, MOST_SCORED)
    values: dict[str, Any] = {
        **parameters(query),
        "condition": f"{scope_query(query)} & {condition}",
        "total": size.passages,
        "most": MOST_SCORED + 1,
        "returned": MOST_RETURNED,
    }
    for number, term in enumerate(terms):
        values[f"term{number}"] = quoted(term)
        values[f"count{number}"] = shares[term] * size.passages if term in shares else None
    rows = work.rows(_statement(len(terms)), values)
    found = rows[0].found if rows else 0
    truncated = None
    if found > MOST_SCORED:
        truncated = f"more than {MOST_SCORED} passages have the words of the query; others were not looked at"
    method = "exact" if size.is_exact else "index"
    leg = SearchLeg(used=True, reason=truncated, method=method, candidates=min(found, MOST_SCORED))
    return WordMatches({row.id: row.score for row in rows}, leg)


@lru_cache(maxsize=word_plan.MOST_TERMS + 1)
def _statement(terms: int) -> TextClause:
    """Return the statement for a number of words."""
    ranks = ", ".join(f"ts_rank(lexemes, CAST(:term{n} AS tsquery)) / {_ONCE} AS f{n}" for n in range(terms))
    counts = ", ".join(
        f"COALESCE(CAST(:count{n} AS float8), count(*) FILTER (WHERE f{n} > 0)) AS n{n}" for n in range(terms)
    )
    weights = " + ".join(
        f"ln(1 + (greatest(:total - n{n}, 0) + 0.5) / (n{n} + 0.5)) * f{n} * {_K1 + 1} / (f{n} + norm)"
        for n in range(terms)
    )
    return text(f"""
        WITH candidate AS MATERIALIZED (
            SELECT id, length, {ranks} FROM passage
            WHERE lexemes @@ CAST(:condition AS tsquery) AND {CONDITIONS} LIMIT :most
        ), counted AS (
            SELECT count(*) AS found, greatest(avg(length), 1) AS mean, {counts} FROM candidate
        )
        SELECT id, found, CAST({weights} AS float8) AS score
        FROM counted, (SELECT candidate.*, {_K1} * ({1 - _B} + {_B} * length / mean) AS norm
                       FROM candidate, counted) AS candidate
        ORDER BY score DESC, id DESC LIMIT :returned
    """)

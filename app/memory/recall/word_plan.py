"""
The choice of the words by which candidates are found, when the scope is too large to look at all that have one.

A word that few passages have finds them all. Frequent words find too many, so they find those that have two of them, or
more. Estimates take words as independent of each other; the search bounds what it reads in any case.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from app.memory.compression.stop_words import STOP_WORDS
from app.memory.compression.texts import words
from app.memory.recall.passages import quoted, terms_of

#: Most words of a query that count: the rarest.
MOST_TERMS = 24
#: Frequent words of which pairs are tried.
_PAIRED = 6


def query_terms(query: str) -> list[str]:
    """Return the words of a query, without stop words unless there are no others, each once."""
    said = [word for word in words(query) if word not in STOP_WORDS["en"]]
    return list(dict.fromkeys(terms_of(" ".join(said)) or terms_of(query)))


def rarest(terms: Sequence[str], frequencies: Mapping[str, float]) -> list[str]:
    """Return the rarest words, the rarest first. A word without a frequency is rare; of two such, the longer is."""
    return sorted(terms, key=lambda term: (frequencies.get(term, 0.0), -len(term)))[:MOST_TERMS]


def any_of(terms: Sequence[str]) -> str:
    """Return a condition (a `tsquery`) that one of the words meets."""
    return f"({' | '.join(map(quoted, terms))})"


def chosen(terms: Sequence[str], frequencies: Mapping[str, float], floor: float, total: float, most: int) -> str:
    """
    Return a condition that finds the passages to rank: about `most`, of `total` passages.

    `terms` are the rarest first, `frequencies` the shares of passages that have a word; the words that are not in it
    have less than `floor`.
    """
    shares = {term: frequencies.get(term, floor / 2) for term in terms}
    found: list[str] = []
    left = float(most)
    rare: list[str] = []
    for term in terms:
        # What has no known frequency is read anyway: there is a bound on how many passages can have it.
        if shares[term] * total > left and term in frequencies:
            break
        left -= shares[term] * total
        rare.append(term)
    if rare:
        found.append(any_of(rare))
    frequent = [term for term in terms if term not in rare]
    for first, second in itertools.combinations(frequent[:_PAIRED], 2):
        size = shares[first] * shares[second] * total
        if size <= left:
            left -= size
            found.append(f"({quoted(first)} & {quoted(second)})")
    if not found:
        # As many of the rarest words at once as bring the number down.
        size, together = total, []
        for term in frequent:
            together.append(term)
            size *= shares[term]
            if size <= most:
                break
        found.append(f"({' & '.join(map(quoted, together))})")
    return f"({' | '.join(found)})"


def inverse_frequency(count: float, total: float) -> float:
    """Return the weight of a word that `count` of `total` passages have, as in BM25."""
    return math.log(1 + (total - count + 0.5) / (count + 0.5)) if count < total else math.log(1 + 0.5 / (total + 0.5))

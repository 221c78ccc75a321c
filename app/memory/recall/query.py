"""What is asked of recall, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum

from app.memory.recall.passages import SourceKind

#: Most passages of an answer, and most characters of a query.
MAX_LIMIT, MAX_QUERY = 200, 10_000
#: Most values of one filter.
MAX_VALUES = 100


class RecallScope(StrEnum):
    """Whose passages are searched."""

    #: Those of the user; without a user, those of the namespace alone.
    OWN = "own"
    #: Those of the user and those of the namespace alone.
    SHARED = "shared"
    #: Those of all users of the namespace.
    ALL = "all"


class RecallMode(StrEnum):
    """How passages are found: by words, by meaning, or by both."""

    HYBRID = "hybrid"
    LEXICAL = "lexical"
    DENSE = "dense"


@dataclass(frozen=True, slots=True)
class RecallQuery:
    """What is asked. An empty filter lets everything pass."""

    text: str
    namespace: str
    user: str | None = None
    scope: RecallScope = RecallScope.OWN
    mode: RecallMode = RecallMode.HYBRID
    limit: int = 10
    sources: tuple[SourceKind, ...] = ()
    #: Ids of conversations.
    conversations: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    #: Kinds of memories.
    kinds: tuple[str, ...] = ()
    #: From this instant on, and before that one.
    since: datetime | None = None
    until: datetime | None = None
    #: A conversation and a position: its passages from there on are left out, because the caller has them.
    outside: tuple[str, int] | None = None
    #: The age at which a score has lost half of its value; None for no decay.
    half_life: timedelta | None = None
    #: Whether the passages beside a good one gain from it.
    neighbours: bool = True


@dataclass(frozen=True, slots=True)
class PassageScores:
    """What the score of a passage is made of."""

    #: BM25 of its words; None when it has none of the query, or words were not searched.
    lexical: float | None = None
    #: The cosine of its vector and that of the query; None when they were not compared.
    dense: float | None = None
    #: What it has from its neighbours.
    neighbours: float = 0.0
    #: The factor of its age.
    decay: float = 1.0


@dataclass(frozen=True, slots=True)
class RecalledPassage:
    """A passage that was found."""

    id: int
    source: str
    source_id: str
    part: int
    text: str
    user: str | None
    conversation: str | None
    #: Its place in the conversation.
    position: int
    role: str | None
    speaker: str | None
    kind: str | None
    at: datetime
    #: The rank of an answer depends on it; it compares passages of one answer only.
    score: float
    scores: PassageScores
    #: Words of the query that it has.
    matched: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SearchLeg:
    """One of the two ways to search, in an answer."""

    used: bool
    #: Why it was not used, or what it could not do.
    reason: str | None = None
    #: `exact`: all passages were compared; `index`: the index of words or of vectors chose them.
    method: str | None = None
    #: Passages that it scored.
    candidates: int = 0
    #: The embedding models.
    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Recalled:
    """The answer: passages, the best first, and how they were found."""

    passages: tuple[RecalledPassage, ...]
    lexical: SearchLeg
    dense: SearchLeg


@dataclass(frozen=True, slots=True)
class QueryVectors:
    """The vectors of a query by the names of their models, or the reason why there are none."""

    vectors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    reason: str | None = None

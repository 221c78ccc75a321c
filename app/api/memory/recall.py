"""Recall: what was said, found by words and by meaning."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from app.access.callers import KeyScope
from app.api import bodies, problems
from app.api.callers import ListedNamespace, NamedNamespace, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.kernel.units.durations import Duration
from app.memory.recall import answers, status
from app.memory.recall.passages import SourceKind
from app.memory.recall.query import MAX_LIMIT, MAX_QUERY, MAX_VALUES, RecallMode, RecallQuery, RecallScope

router = ApiRouter(prefix="/v1/recall", tags=["memory"], dependencies=[requires(KeyScope.READ)])


def _no_number(value: Any) -> Any:
    if not isinstance(value, str) or "-" not in value:
        raise ValueError("this is no time; accepted: 2026-11-22T09:00:00Z")
    return value


def _with_zone(value: datetime) -> datetime:
    if value.tzinfo is None:
        raise ValueError("the time has no zone; accepted: 2026-11-22T09:00:00Z")
    return value


def _positive(value: timedelta) -> timedelta:
    if not value:
        raise ValueError("the duration must be greater than 0")
    return value


_Instant = Annotated[datetime, BeforeValidator(_no_number), AfterValidator(_with_zone)]
_Text = Annotated[str, Field(min_length=1, max_length=200)]
_Values = Annotated[list[_Text], Field(max_length=MAX_VALUES)]


class RecallIn(BaseModel):
    """What is asked. Filters that are not given let everything pass."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={"examples": [{"query": "When does the lease of the boat end?", "user": "anna", "limit": 5}]},
    )

    query: str = Field(min_length=1, max_length=MAX_QUERY)
    user: _Text | None = Field(default=None, description="without one, what belongs to the namespace alone is searched")
    scope: RecallScope = Field(
        default=RecallScope.OWN,
        description="whose passages: those of the user, those and the namespace's, or those of all users",
    )
    mode: RecallMode = RecallMode.HYBRID
    limit: int = Field(default=10, ge=1, le=MAX_LIMIT)
    sources: Annotated[list[SourceKind], Field(max_length=len(SourceKind))] = []
    conversations: _Values = Field(default=[], description="ids of conversations")
    roles: _Values = []
    kinds: _Values = Field(default=[], description="kinds of memories")
    since: _Instant | None = Field(default=None, description="passages from this instant on")
    until: _Instant | None = Field(default=None, description="passages before this instant")
    half_life: Annotated[Duration, AfterValidator(_positive)] | None = Field(
        default=None, description="the age at which a score has lost half of its value, such as `30d`"
    )
    neighbours: bool = Field(default=True, description="passages beside a good one gain from it")

    def asked(self, namespace: str) -> RecallQuery:
        """The query, in a namespace."""
        return RecallQuery(
            self.query,
            namespace,
            user=self.user,
            scope=self.scope,
            mode=self.mode,
            limit=self.limit,
            sources=tuple(self.sources),
            conversations=tuple(self.conversations),
            roles=tuple(self.roles),
            kinds=tuple(self.kinds),
            since=self.since,
            until=self.until,
            half_life=self.half_life,
            neighbours=self.neighbours,
        )


class PassageScoresOut(BaseModel):
    """What the score of a passage is made of."""

    lexical: float | None = Field(description="BM25 of its words; null when it has none of the query")
    dense: float | None = Field(description="cosine of its vector and the query's; null when they were not compared")
    neighbours: float = Field(description="what it has from the passages beside it")
    decay: float = Field(description="the factor of its age")


class PassageOut(BaseModel):
    """A passage: a message, a memory, a block or a document, or a part of one."""

    id: int
    source: SourceKind
    source_id: str
    part: int = Field(description="its number within the source, from 0")
    text: str
    user: str | None
    conversation: str | None
    position: int = Field(description="its place in the conversation")
    role: str | None
    speaker: str | None
    kind: str | None
    at: datetime
    score: float = Field(description="compares passages of one answer")
    scores: PassageScoresOut
    matched: list[str] = Field(description="words of the query that it has, cut to their stems")
    why: str


class SearchLegOut(BaseModel):
    """One of the two ways to search."""

    used: bool
    reason: str | None = Field(description="why it was not used, or what it could not do")
    method: str | None = Field(default=None, description="`exact`, or `index`")
    candidates: int = 0
    models: list[str] = []


class RecallOut(BaseModel):
    """Passages, the best first, and how they were found."""

    object: str = "recall"
    passages: list[PassageOut]
    lexical: SearchLegOut
    dense: SearchLegOut


class RecallModelOut(BaseModel):
    """An embedding model."""

    name: str
    file: str | None = Field(description="the beginning of the SHA-256 of its file; null: not known yet, or no file")
    state: str = Field(description="`building`, `ready`, or `retired`: its vectors are being removed")
    dimensions: int | None
    vectors: int = Field(description="that it has made")
    is_indexed: bool
    run: str | None = Field(description="the run that makes vectors now, or made the last ones")
    problem: str | None


class CountOut(BaseModel):
    """A number of passages."""

    count: int
    is_exact: bool = Field(description="whether they were counted; otherwise it is an estimate of the database")


class RecallStatusOut(BaseModel):
    """What can be recalled, and how far the vectors are behind."""

    passages: CountOut
    waiting: CountOut = Field(description="passages that have no vector yet, and are found by their words alone")
    refused: int = Field(description="passages of which no vector can be made, at most 1000 are counted")
    lag_s: float = Field(description="seconds for which the oldest of those that wait has waited")
    embedding_model: str = Field(description="the setting recall.embedding_model; empty: none")
    models: list[RecallModelOut]


@router.post(
    "",
    summary="Find what was said",
    responses=problems.documented(413, 415, 422, 503),
    openapi_extra=bodies.documented_as(RecallIn),
)
def recall(
    services: InjectedServices, namespace: NamedNamespace, body: Annotated[RecallIn, bodies.of(RecallIn)]
) -> RecallOut:
    """
    Passages of messages, memories, blocks and documents that have most to do with a query, the best first.

    They are found by words (BM25) and by meaning (embeddings). When the embedding model is not loaded or too slow, by
    words alone: `dense.used` is false then, with the `reason`.
    """
    return RecallOut.model_validate(answers.document(services.recall.search(body.asked(namespace))))


@router.get("/status", summary="What can be recalled", responses=problems.documented(422, 503))
def recall_status(services: InjectedServices, namespace: ListedNamespace) -> RecallStatusOut:
    """How many passages there are, how many wait for their vectors and for how long, and which models make them."""
    found = status.read(services.database, namespace)
    models: list[dict[str, Any]] = [
        {
            "name": model.name,
            "file": model.file,
            "state": model.state,
            "dimensions": model.dimensions,
            "vectors": model.made,
            "is_indexed": model.is_indexed,
            "run": None if model.run_id is None or namespace is not None else str(model.run_id),
            "problem": model.problem,
        }
        for model in found.models
    ]
    return RecallStatusOut(
        passages=CountOut(count=found.passages, is_exact=found.is_exact),
        waiting=CountOut(count=found.waiting, is_exact=found.waiting < status.MOST_COUNTED),
        refused=found.refused,
        lag_s=round(found.lag.total_seconds(), 1),
        embedding_model=services.settings.recall.embedding_model,
        models=[RecallModelOut.model_validate(model) for model in models],
    )

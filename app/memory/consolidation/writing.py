"""The patterns of a run become memories, in one transaction of the caller: new ones, or more sources of known ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.files.file import parsed_id
from app.kernel.database import UnitOfWork
from app.kernel.errors import Conflict, InvalidInput
from app.memory.consolidation import patterns, prompt, store, turns
from app.memory.consolidation.consolidation import Consolidation, ConsolidationState, PatternOutcome, TurnCluster
from app.memory.consolidation.patterns import JudgedPattern, PatternReason
from app.memory.consolidation.store import ConsolidationEnd
from app.memory.consolidation.turns import ReadTurn
from app.memory.conversations import store as conversation_store
from app.memory.conversations.message import MESSAGE_PREFIX
from app.memory.memories import service as memories
from app.memory.memories import store as memory_store
from app.memory.memories.kinds import MAX_SOURCES, MemoryEvent, MemoryKind, MemoryOrigin
from app.memory.memories.memory import PREFIX, Memory, MemorySource, NewMemory
from app.memory.recall.vectors import RecallModel

#: Known patterns of a user that a new one is compared with, the newest first.
_KNOWN = 300
#: How much a pattern matters.
_IMPORTANCE = 0.6
# One that was superseded has a successor, which says what is true now.
_KNOWN_PATTERNS = text("""
    SELECT memory.id, memory.text, memory.confidence, memory.invalid_at IS NULL AS holds,
           CAST(passage_vector.vector AS text) AS vector
    FROM memory
    LEFT JOIN passage ON passage.namespace = memory.namespace AND passage.source = 'memory' AND passage.part = 0
                     AND passage.source_id = 'mem_' || replace(CAST(memory.id AS text), '-', '')
    LEFT JOIN passage_vector ON passage_vector.passage_id = passage.id AND passage_vector.model_id = :model
    WHERE memory.namespace = :namespace AND memory.kind = 'pattern'
      AND memory.user_name IS NOT DISTINCT FROM CAST(:user AS text) AND memory.superseded_by IS NULL
    ORDER BY memory.id DESC LIMIT :limit
""")


@dataclass(slots=True)
class _KnownPattern:
    id: UUID
    text: str
    confidence: float
    holds: bool
    vector: Sequence[float] | None


@dataclass(slots=True)
class PatternWriter:
    """Writes the patterns of one consolidation."""

    work: UnitOfWork
    consolidation: Consolidation
    min_turns: int
    min_confidence: float
    _known: dict[str | None, list[_KnownPattern]] = field(default_factory=dict)

    def write(self, outputs: Mapping[str, Any], model: RecallModel | None) -> ConsolidationEnd:
        """Write what the run has found, cluster by cluster; returns the end of the consolidation."""
        one = self.consolidation
        clusters = [TurnCluster.read(stored) for stored in one.plan]
        first, second = outputs[prompt.FIRST], outputs[prompt.SECOND]
        vectors = outputs[prompt.VECTORS]
        there = turns.all_of(self.work, one.namespace, [id_ for cluster in clusters for id_ in cluster.passages])
        outcomes: list[dict[str, Any]] = []
        for number, cluster in enumerate(clusters):
            read = [there[id_] for id_ in cluster.passages if id_ in there]
            near = patterns.cosine(vectors[number], vectors[len(clusters) + number])
            if len({turn.source_id for turn in read}) < min(self.min_turns, 2):
                judged = JudgedPattern("", PatternReason.TURNS_DELETED)
            else:
                judged = patterns.judge(
                    first[number], second[number], near, [turn.text for turn in read], self.min_confidence
                )
            outcome = {"turns": len(read), **self._outcome(cluster, read, judged, vectors[number], model)}
            if judged.text:
                outcome |= {"agreement": judged.agreement, "grounded": judged.grounded}
            outcomes.append({"cluster": number, **outcome})
        counts = {name: sum(one["outcome"] == name for one in outcomes) for name in PatternOutcome}
        assert one.run_id is not None, "it has outputs"
        return ConsolidationEnd(
            ConsolidationState.SUCCEEDED,
            written=counts[PatternOutcome.WRITTEN],
            merged=counts[PatternOutcome.MERGED],
            refused=counts[PatternOutcome.REFUSED],
            outcomes=outcomes,
            progress=store.progress_of(self.work, one.run_id),
        )

    def _outcome(
        self,
        cluster: TurnCluster,
        read: Sequence[ReadTurn],
        judged: JudgedPattern,
        vector: Sequence[float],
        model: RecallModel | None,
    ) -> dict[str, Any]:
        reason: PatternReason | None = judged.reason
        if reason is None:
            same = self._same(cluster.user, judged.text, vector, model)
            if same is None:
                memory = self._remember(cluster, read, judged)
                if memory is not None:
                    known = _KnownPattern(memory.id, memory.text, memory.confidence, True, vector)
                    self._known[cluster.user].insert(0, known)
                    return _done(PatternOutcome.WRITTEN, judged.confidence, memory.id)
                reason = PatternReason.FORM
            elif same.holds:
                confidence = self._reinforce(same, read, judged)
                return _done(PatternOutcome.MERGED, confidence, same.id)
            else:
                reason = PatternReason.ENDED
        return {"outcome": PatternOutcome.REFUSED, "reason": reason, "confidence": judged.confidence}

    def _same(
        self, user: str | None, pattern: str, vector: Sequence[float], model: RecallModel | None
    ) -> _KnownPattern | None:
        """The known pattern that says the same; one that holds before one that somebody has ended."""
        found = [
            known
            for known in self._known_of(user, model)
            if patterns.says_the_same(
                pattern, known.text, None if known.vector is None else patterns.cosine(vector, known.vector)
            )
        ]
        return min(found, key=lambda known: not known.holds, default=None)

    def _known_of(self, user: str | None, model: RecallModel | None) -> list[_KnownPattern]:
        if user not in self._known:
            values = {
                "namespace": self.consolidation.namespace,
                "user": user,
                "model": None if model is None else model.id,
                "limit": _KNOWN,
            }
            self._known[user] = [
                _KnownPattern(
                    row.id, row.text, row.confidence, row.holds, None if row.vector is None else json.loads(row.vector)
                )
                for row in self.work.rows(_KNOWN_PATTERNS, values)
            ]
        return self._known[user]

    def _remember(self, cluster: TurnCluster, read: Sequence[ReadTurn], judged: JudgedPattern) -> Memory | None:
        new = NewMemory(
            judged.text,
            MemoryKind.PATTERN,
            cluster.user,
            None,
            self._sources(read),
            max(turn.at for turn in read),
            _IMPORTANCE,
            judged.confidence,
        )
        try:
            done = memories.remember_in(self.work, new, self.consolidation.namespace, prompt.WORKFLOW)
        except (Conflict, InvalidInput):
            return None
        return done.memory

    def _reinforce(self, known: _KnownPattern, read: Sequence[ReadTurn], judged: JudgedPattern) -> float:
        known.confidence = patterns.reinforced(known.confidence, judged.confidence)
        memory_store.reinforce(self.work, known.id, known.confidence, self._sources(read))
        note = f"{len(read)} more turns say it"
        memory_store.note(self.work, known.id, MemoryEvent.REINFORCED, prompt.WORKFLOW, note)
        return known.confidence

    def _sources(self, read: Sequence[ReadTurn]) -> list[MemorySource]:
        """The messages of turns, the sources of events, and the run; no more than a memory may have."""
        run = MemorySource(MemoryOrigin.RUN, prompt.WORKFLOW, run_id=self.consolidation.run_id)
        wanted = {parsed_id(turn.source_id, MESSAGE_PREFIX) for turn in read if turn.source == "message"} - {None}
        messages = conversation_store.find_messages(self.work, [one for one in wanted if one is not None])
        found = [
            MemorySource(MemoryOrigin.MESSAGE, one.role.value, one.conversation_id, one.id)
            for one in sorted(messages.values(), key=lambda one: (one.created_at, one.id))
        ]
        events = {parsed_id(turn.source_id, PREFIX) for turn in read if turn.source == "memory"} - {None}
        for memory in memory_store.all_of(self.work, [one for one in events if one is not None]):
            found += [source for source in memory.sources if source not in found]
        return [*found[: MAX_SOURCES - 1], run]


def _done(outcome: PatternOutcome, confidence: float, memory_id: UUID) -> dict[str, Any]:
    return {"outcome": outcome, "confidence": confidence, "memory": memories.shown(memory_id)}

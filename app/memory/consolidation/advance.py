"""
The job of consolidations: each pass begins those that are due and takes every one that has not ended a step further.

Turns are read once their vectors are there, and clustered in another process. The run that reads the clusters is
written in the same transaction as the clusters, and its patterns in the same transaction as the place up to which was
read. So nothing is read twice, and nothing is lost when a process dies in between: a step of the run that has ended
stays done, and a run that has ended is found again. The run is removed when its patterns are written: it has texts.

A consolidation that raises fails with the reason, and stops no other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from app.access import namespaces
from app.kernel import ids, log
from app.kernel.database import UnitOfWork
from app.kernel.errors import ArrieroError, DatabaseUnreachable, RowsLocked, Unavailable, shortened
from app.kernel.sections.consolidation import ConsolidationSettings
from app.memory.consolidation import prompt, service, store, turns
from app.memory.consolidation.consolidation import Consolidation, ConsolidationState, TurnCluster
from app.memory.consolidation.store import ConsolidationEnd
from app.memory.consolidation.turns import ReadTurn
from app.memory.consolidation.writing import PatternWriter
from app.memory.conversations import store as conversation_store
from app.memory.conversations.service import parsed_conversation
from app.memory.recall import vectors
from app.memory.recall.vectors import RecallModel
from app.workflows import retention
from app.workflows.runs import submission
from app.workflows.runs.service import Runs
from app.workflows.runs.storage import values
from app.workflows.runs.submission import Submission
from app.workflows.state_machine.states import FINAL_RUNS, RunState

_log = log.get(__name__)

#: Consolidations that one pass begins or advances.
_AT_ONCE = 50
#: Consolidations of a namespace that are kept after their end.
_KEPT = 200
#: How often a consolidation begins again because a conversation was deleted, and its run with it.
_MAX_RESTARTS = 3
#: For how long the run of a consolidation is kept that has failed or was cancelled.
_RETENTION = timedelta(hours=1)
_MAX_OUTPUT = 4_194_304

#: Groups of vectors, each as JSON, and the fewest turns of a cluster, to the clusters of each group, the largest first:
#: the indexes of vectors, those nearest to the middle first. It runs outside of any transaction.
Clusterer = Callable[[Sequence[Sequence[str]], int, timedelta], Sequence[Sequence[Sequence[int]]]]


@dataclass(frozen=True, slots=True)
class Consolidations:
    """The consolidations of all namespaces."""

    runs: Runs
    settings: ConsolidationSettings
    #: The model of the catalogue whose vectors recall stores; empty for none.
    embedding_model: str
    cluster: Clusterer

    def advance_all(self) -> int:
        """Take everything a step further; returns how many consolidations have not ended."""
        database = self.runs.database
        with database.work() as work:
            for namespace in store.take_due(work, _AT_ONCE):
                service.begin_in(work, self.settings, namespace, "schedule")
            found = store.open_ids(work, _AT_ONCE)
        for id_ in found:
            self._guarded(id_)
        return len(found)

    def _guarded(self, id_: UUID) -> None:
        try:
            self.advance(id_)
        except DatabaseUnreachable:
            raise
        except Unavailable as error:
            with self.runs.database.work() as work:
                store.wait(work, id_, shortened(str(error), 500))
        except Exception as error:  # noqa: BLE001 one consolidation must not stop the others; it fails with the reason
            if isinstance(error, ArrieroError):
                _log.warning("consolidation_failed", consolidation_id=str(id_), error=str(error))
            else:
                _log.exception("consolidation_failed", consolidation_id=str(id_))
            with self.runs.database.work() as work:
                self._end(work, id_, shortened(f"{error}" or type(error).__name__, 500))

    def advance(self, id_: UUID) -> None:
        """Take one consolidation a step further."""
        with self.runs.database.work() as work:
            found = store.find(work, id_)
        if found is None:
            return
        if found.state == ConsolidationState.QUEUED:
            self._begin(found)
        elif found.state == ConsolidationState.RUNNING:
            assert found.run_id is not None, "it is written with the state"
            self._finish(found, found.run_id)

    # -- what is read -----------------------------------------------------------------------------------------------

    def _begin(self, one: Consolidation) -> None:
        with self.runs.database.work() as work:
            why = self._waits_for(work, one)
            store.wait(work, one.id, why)
            if why:
                return
            model = self._model(work)
            limit = self.settings.max_turns
            new = turns.new_ids(work, one.namespace, one.read_after, one.read_through, limit + 1)
            has_more = len(new) > limit
            new = new[:limit]
            through = new[-1] if has_more else one.read_through
            left = turns.leftovers(work, one.namespace, limit - len(new))
            read = [] if model is None else turns.with_vectors(work, one.namespace, [*left, *new], model)
        clusters = self._clusters(read)
        clustered = {passage for cluster in clusters for passage in cluster.passages}
        noise = [turn.id for turn in read if turn.id not in clustered]
        prepared = None
        if clusters:
            texts = {turn.id: turn.text for turn in read}
            prepared = submission.prepare(
                self._submission(one, [[texts[id_] for id_ in cluster.passages] for cluster in clusters]),
                self.runs.policy,
                route=self.runs.route,
            )
        with self.runs.transaction() as transaction:
            work = transaction.work
            now = store.find(work, one.id, lock=True)
            if now is None or now.state != ConsolidationState.QUEUED:
                return  # it was cancelled
            run_id = one.id if prepared is None else prepared.id
            store.start(
                work,
                one.id,
                run_id,
                clusters,
                noise,
                through=through,
                has_more=has_more,
                turns=len(read),
                leftovers=sum(turn.id in left for turn in read),
            )
            if prepared is None:
                started = store.find(work, one.id)
                assert started is not None, "it is locked"
                self._written(work, started, ConsolidationEnd(ConsolidationState.SUCCEEDED))
                return
            submission.create(transaction, prepared)
            of = {turn.conversation for turn in read if turn.id in clustered and turn.conversation is not None}
            for conversation in sorted(of):  # in one order, so that two transactions do not wait for each other
                if (parsed := parsed_conversation(conversation)) is not None:
                    conversation_store.link_runs(work, parsed, {prepared.id})
        _log.info("consolidation_begun", consolidation_id=str(one.id), turns=len(read), clusters=len(clusters))

    def _model(self, work: UnitOfWork) -> RecallModel | None:
        return next((model for model in vectors.all_models(work) if model.name == self.embedding_model), None)

    def _waits_for(self, work: UnitOfWork, one: Consolidation) -> str:
        """Why turns cannot be read yet; empty when they can. Raises Unavailable, with a reason to wait."""
        if not turns.is_settled(work, one.horizon):
            return "other transactions to end"
        limit = self.settings.max_turns
        new = turns.new_ids(work, one.namespace, one.read_after, one.read_through, limit)
        if not new:
            return ""
        if not self.embedding_model:
            raise Unavailable("there is no embedding model: choose one with the setting recall.embedding_model")
        model = self._model(work)
        if model is None:
            return f"{len(new)} vectors of {self.embedding_model}"
        missing = turns.without_vector(work, new, model)
        problem = f": {model.problem}" if model.problem else ""
        return f"{missing} vectors of {model.name}{problem}" if missing else ""

    def _clusters(self, read: Sequence[ReadTurn]) -> list[TurnCluster]:
        """Cluster the turns of each user by themselves: what one user says becomes no memory of another."""
        of: dict[str, list[ReadTurn]] = defaultdict(list)
        for turn in read:
            of[turn.owner].append(turn)
        groups = [(owner, group) for owner, group in sorted(of.items()) if len(group) >= self.settings.min_turns]
        if not groups:
            return []
        given = [[turn.vector for turn in group] for _, group in groups]
        answer = self.cluster(given, self.settings.min_turns, self.settings.cluster_timeout)
        found = [
            TurnCluster(owner or None, tuple(group[index].id for index in indexes))
            for (owner, group), clusters in zip(groups, answer, strict=True)
            for indexes in clusters
        ]
        found.sort(key=lambda cluster: len(cluster.passages), reverse=True)
        return found[: self.settings.max_clusters]

    def _submission(self, one: Consolidation, texts: Sequence[Sequence[str]]) -> Submission:
        labels = {} if one.namespace == namespaces.DEFAULT else {namespaces.LABEL: one.namespace}
        return Submission(
            prompt.definition_of(one.model, one.review_model, self.embedding_model, self.settings.max_parallel),
            prompt.inputs_of(texts),
            labels=labels,
            deadline=self.settings.timeout,
            retention=_RETENTION,
            id=ids.new_id(),
        )

    # -- what is written --------------------------------------------------------------------------------------------

    def _finish(self, one: Consolidation, run_id: UUID) -> None:
        with self.runs.database.work() as work:
            run = store.run_of(work, run_id)
            if run is None:
                self._restart(work, one)
                return
            if run.state not in FINAL_RUNS:
                return
            outputs: Mapping[str, Mapping[str, object]] = {}
            if run.state == RunState.SUCCEEDED:
                wanted = [prompt.FIRST, prompt.SECOND, prompt.VECTORS]
                outputs = values.outputs(work, run_id, wanted, _MAX_OUTPUT)
        with self.runs.transaction() as transaction:
            work = transaction.work
            now = store.find(work, one.id, lock=True)
            if now is None or now.run_id != run_id or now.state != ConsolidationState.RUNNING:
                return
            if run.state != RunState.SUCCEEDED:
                reason = shortened(str((run.error or {}).get("message", f"the run was {run.state}")), 400)
                self._end(work, one.id, f"run {run_id}: {reason}")
                return
            writer = PatternWriter(work, now, self.settings.min_turns, self.settings.min_confidence)
            how = writer.write({key: output["output"] for key, output in outputs.items()}, self._model(work))
            self._written(work, now, how)
        try:
            retention.remove_ended_run(self.runs.database, run_id)
        except RowsLocked:
            _log.info("consolidation_run_kept", run_id=str(run_id))  # its retention is short

    def _written(self, work: UnitOfWork, one: Consolidation, how: ConsolidationEnd) -> None:
        """Write that the turns of a consolidation were read, and its end."""
        store.advance(
            work,
            one.namespace,
            one.read_through,
            [passage for cluster in one.plan for passage in TurnCluster.read(cluster).passages],
            one.noise,
            max_rounds=self.settings.max_rounds,
            most=self.settings.max_turns // 2,
        )
        store.end(work, one.id, how)
        store.remove_old(work, one.namespace, _KEPT)
        _log.info(
            "consolidation_ended",
            consolidation_id=str(one.id),
            written=how.written,
            merged=how.merged,
            refused=how.refused,
        )

    def _restart(self, work: UnitOfWork, one: Consolidation) -> None:
        """Begin again with the turns that are left: a conversation was deleted, and the run with it."""
        now = store.find(work, one.id, lock=True)
        if now is None or now.state != ConsolidationState.RUNNING or now.run_id != one.run_id:
            return
        if now.restarts >= _MAX_RESTARTS:
            self._end(work, one.id, f"its run was removed {now.restarts + 1} times: conversations were deleted")
        else:
            store.restart(work, one.id)

    def _end(self, work: UnitOfWork, id_: UUID, error: str) -> None:
        """Write that a consolidation failed. Its turns are read by the next one."""
        found = store.find(work, id_, lock=True)
        if found is not None:
            progress = service.progress_of(work, found)
            store.end(work, id_, ConsolidationEnd(ConsolidationState.FAILED, error, progress=progress))

"""
The service of shadows: start, end and show them; and the pass that begins runs of candidates and compares ended pairs.

A run of a candidate belongs to the class `batch`, and begins after the run that it repeats has ended: nothing of it is
in the path of a call. Its id follows from the shadow and that run, so a pass that died in the middle begins it once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid5

from app.catalog.catalog import Catalog
from app.inference.shadows import comparison, definition, pairing, store
from app.inference.shadows.comparison import JudgePreference, PairEvidence, PairSide
from app.inference.shadows.definition import ShadowDefinition
from app.inference.shadows.rows import PairState, ShadowState, StoredPair, StoredShadow
from app.inference.splits import table
from app.kernel import ids, log
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import ArrieroError, Conflict, InvalidInput, NotFound, Problem, Unavailable
from app.workflows import registry
from app.workflows.language.definition import Definition
from app.workflows.language.steps import work_of
from app.workflows.runs import views
from app.workflows.runs.details import RunView
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission
from app.workflows.state_machine.states import RunState

_log = log.get(__name__)

#: Most shadows that run at the same time, runs that one pass begins and pairs that it compares of one shadow.
MAX_RUNNING, BATCH = 50, 200
#: Most pairs, the newest, that a report is made of.
MOST_REPORTED = 10_000
#: Bytes of a text that is compared; longer runs are left out.
_MOST_BYTES = 1024 * 1024
#: Kinds of steps that change nothing outside of their run.
HARMLESS = frozenset(
    {
        *("generate", "embed", "openai", "transform", "noop", "join", "switch", "map", "verify", "refine", "ensemble"),
        *("compress", "recall"),
    }
)


@dataclass(frozen=True, slots=True)
class ShadowPass:
    """What a pass has done."""

    begun: int = 0
    compared: int = 0
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class ShadowReport:
    """What a shadow has found."""

    stored: StoredShadow
    given: ShadowDefinition
    open: int
    compared: int
    #: By reason, runs that were not done again or not compared.
    skipped: Mapping[str, int]
    metrics: list[PairEvidence]
    #: The mean similarity of the texts, and of how many pairs.
    similarity: float | None
    similar_pairs: int
    preferences: Mapping[JudgePreference, int]
    #: The part of the judge's answers that named the first place; 0.5 is without a bias.
    position_bias: float | None


class Shadows:
    """The service."""

    def __init__(self, runs: Runs, catalog: Callable[[], Catalog]) -> None:
        self._runs, self._catalog = runs, catalog
        self._database: Database = runs.database

    def start(self, work: UnitOfWork, document: object, author: str) -> StoredShadow:
        """Start a shadow. Raises InvalidInput with every problem, Conflict when the name is taken."""
        given = definition.parse(document)
        problems = self._unknown(given)
        if problems:
            raise InvalidInput(problems, "shadow")
        store.lock_all(work)
        if store.get(work, given.shadow) is not None:
            raise Conflict(f"there is a shadow {given.shadow!r}: remove it, or take another name")
        if len(store.running(work)) >= MAX_RUNNING:
            raise Conflict(f"{MAX_RUNNING} shadows run, which is the most: stop one")
        return store.insert(work, ids.new_id(), given, author)

    def stop(self, work: UnitOfWork, name: str, reason: str) -> StoredShadow:
        """End a shadow; pairs that are open are still compared. Raises NotFound, Conflict when it has ended before."""
        found = self.get(work, name, lock=True)
        if not store.end(work, found.id, ShadowState.STOPPED, reason):
            raise Conflict(f"the shadow {name!r} has ended: {found.state}")
        return self.get(work, name)

    def remove(self, work: UnitOfWork, name: str) -> None:
        """Remove a shadow that has ended, with its pairs. Raises NotFound, Conflict while it runs."""
        found = self.get(work, name, lock=True)
        if found.state == ShadowState.RUNNING:
            raise Conflict(f"the shadow {name!r} runs: stop it first")
        store.delete(work, found.id)

    def get(self, work: UnitOfWork, name: str, *, lock: bool = False) -> StoredShadow:
        """Return a shadow. Raises NotFound."""
        found = store.get(work, name, lock=lock)
        if found is None:
            raise NotFound("shadow", name, [one.name for one in store.page(work, 50)])
        return found

    def report(self, name: str) -> ShadowReport:
        """Return what a shadow has found. Raises NotFound."""
        with self._database.work() as work:
            found = self.get(work, name)
            counted = store.counts(work, found.id)
            results = store.results(work, found.id, MOST_REPORTED)
        given = definition.parse(found.definition)
        near = [one["similarity"] for one in results if one.get("similarity") is not None]
        preferred = [JudgePreference(one["preference"]) for one in results if one.get("preference")]
        answers = [one[order] for one in results for order in ("first", "second") if one.get(order) in ("A", "B")]
        return ShadowReport(
            found,
            given,
            sum(count for state, _, count in counted if state is PairState.OPEN),
            sum(count for state, _, count in counted if state is PairState.COMPARED),
            {reason: count for state, reason, count in counted if state is PairState.SKIPPED},
            comparison.evidence_of((one["differences"] for one in results), given.effect, given.alpha),
            sum(near) / len(near) if near else None,
            len(near),
            {one: preferred.count(one) for one in JudgePreference if one in preferred},
            answers.count("A") / len(answers) if answers else None,
        )

    def advance(self) -> ShadowPass:
        """Begin runs of candidates for what has ended, and compare pairs whose candidate has ended."""
        with self._database.work() as work:
            running, waiting = store.running(work), store.with_open_pairs(work)
        begun = skipped = compared = 0
        for one in running:
            done = self._begin(one.id)
            begun, skipped = begun + done[0], skipped + done[1]
        for one in waiting:
            compared += self._compare(one)
        return ShadowPass(begun, compared, skipped)

    # -- the runs of candidates -------------------------------------------------------------------------------------

    def _begin(self, id_: UUID) -> tuple[int, int]:
        """Begin runs of the candidate of a shadow; returns how many, and how many runs are left out."""
        with self._database.work() as work:
            found = store.lock_running(work, id_)
            if found is None:
                return 0, 0
            given = definition.parse(found.definition)
            model = None if given.model is None else self._name(given.model)
            chosen = store.sampled(work, id_, given, model, BATCH)
            room = given.max_open - store.count_open(work, id_)
            if given.pairs is not None:
                done = sum(count for state, _, count in store.counts(work, id_) if state is not PairState.SKIPPED)
                room, left = min(room, given.pairs - done), given.pairs - done
                if left <= 0:
                    store.end(work, id_, ShadowState.COMPLETE, f"{given.pairs} pairs")
                    return 0, 0
        begun = skipped = 0
        for run_id in chosen:
            if begun >= room:
                reason: str | None = f"{given.max_open} runs of the candidate were open"
                candidate = None
            else:
                candidate, reason = self._submitted(found, given, run_id)
            state = PairState.OPEN if candidate is not None else PairState.SKIPPED
            with self._database.work() as work:
                if store.put_pair(work, id_, run_id, candidate, state, reason or ""):
                    begun, skipped = begun + (candidate is not None), skipped + (candidate is None)
        return begun, skipped

    def _submitted(self, found: StoredShadow, given: ShadowDefinition, run_id: UUID) -> tuple[UUID | None, str | None]:
        """Submit the run of the candidate; returns its id, or why there is none."""
        try:
            view = views.run(self._database, run_id, _MOST_BYTES)
            request = self._submission(found, given, view)
            return (None, request) if isinstance(request, str) else (self._runs.submit(request).id, None)
        except Unavailable:
            raise
        except (ArrieroError, ValueError) as error:  # one run that cannot be done again stops no other one
            _log.warning("shadow_not_begun", shadow=found.name, run_id=str(run_id), error=str(error))
            return None, "it cannot be done again"

    def _submission(self, found: StoredShadow, given: ShadowDefinition, view: RunView) -> Submission | str:
        """The run of the candidate, or why there is none."""
        run = view.run
        if run.inputs_shown is False or run.output_shown is False:
            return "it is too large to compare"
        candidate, options = given.tried, given.compare
        judge = options.judge if _is_judged(run.id, float(options.judge_share)) else None
        if given.workflow is not None:
            definition_, request = self._of_run(given, run.inputs, run.namespace, judge), run.inputs
            text = comparison.side_of_answer(run.output)[0]
            question = str(run.inputs)
        else:
            request = run.inputs.get("request") if isinstance(run.inputs, Mapping) else None
            if not isinstance(request, Mapping) or not ("messages" in request or "prompt" in request):
                return "it is no request for text"
            if request.get("conversation_id") is not None or request.get("memory") is not None:
                return "it continues a conversation"
            model = candidate.model or given.model
            assert model is not None, "a shadow of calls has a model"
            request = {
                name: value
                for name, value in table.changed_body(request, candidate).items()
                if name not in ("model", "stream", "stream_options")
            }
            definition_ = pairing.definition_of_call(self._name(model) or model, options.similarity, judge)
            text = comparison.side_of_answer(view.steps[0].output)[0]
            question = _question_of(request)
        inputs = {
            "request": request,
            "created": int(run.created_at.timestamp()),
            "text": text,
            "question": question[:6_000],
            "criteria": options.criteria,
        }
        return Submission(
            definition_,
            inputs,
            priority="batch",
            labels={pairing.SHADOW_LABEL: found.name, pairing.SOURCE_LABEL: str(run.id)},
            id=uuid5(found.id, str(run.id)),
            namespace=run.namespace,
        )

    def _of_run(self, given: ShadowDefinition, inputs: Any, namespace: str, judge: str | None) -> Definition:
        assert given.workflow is not None, "a shadow of runs"
        version = given.tried.version
        assert version is not None, "it was checked"
        found = registry.get(self._database, given.workflow, version, namespace=namespace)
        _require_harmless(found.definition)
        return pairing.definition_of_run(given.workflow, version, tuple(inputs), given.compare.similarity, judge)

    # -- comparison -------------------------------------------------------------------------------------------------

    def _compare(self, one: StoredShadow) -> int:
        """Compare the pairs of a shadow whose candidate has ended; returns how many."""
        with self._database.work() as work:
            pairs = store.ended_pairs(work, one.id, BATCH)
        for pair in pairs:
            try:
                result, reason = self._result(pair), ""
            except NotFound:
                result, reason = None, "one of its runs was cancelled or removed"
            except Unavailable:
                raise
            except Exception:  # noqa: BLE001 one pair that cannot be compared stops no other one
                _log.exception("pair_not_compared", shadow=one.name, run_id=str(pair.run_id))
                result, reason = None, "it cannot be compared"
            state = PairState.COMPARED if result is not None else PairState.SKIPPED
            with self._database.work() as work:
                store.close_pair(work, one.id, pair.run_id, state, result, reason)
        return len(pairs)

    def _result(self, pair: StoredPair) -> dict[str, Any] | None:
        assert pair.candidate_run_id is not None, "an open pair has one"
        original = views.run(self._database, pair.run_id, _MOST_BYTES)
        candidate = views.run(self._database, pair.candidate_run_id, _MOST_BYTES)
        outputs = {step.key: step.output for step in candidate.steps if step.state == "succeeded"}
        if candidate.run.state == RunState.CANCELLED:
            raise NotFound("run", str(pair.candidate_run_id))
        answered = pairing.ANSWER in outputs
        other = self._side(candidate, outputs[pairing.ANSWER], pairing.ANSWER) if answered else None
        is_call = original.run.workflow == "openai"
        before = self._side(original, original.steps[0].output if is_call else original.run.output, None)
        request = original.run.inputs.get("request") if is_call else None
        first, second = (_better(outputs.get(name)) for name in (pairing.FIRST, pairing.SECOND))
        preferred = comparison.preference(first, second)
        similarity = comparison.cosine(_vectors(outputs.get(pairing.VECTORS)))
        return {
            "differences": comparison.compared(before, other, request, preferred),
            "similarity": similarity,
            "preference": preferred,
            "first": first,
            "second": second,
            "error": None if other is not None else (candidate.run.error or {}).get("message", "it failed")[:300],
        }

    def _side(self, view: RunView, output: Any, key: str | None) -> PairSide:
        """What a run did; `key` is the step that counts, None all of them."""
        text, tools, finish = comparison.side_of_answer(output)
        steps = [step for step in view.steps if key is None or step.key == key]
        called = [step.called_run_id for step in steps if step.called_run_id is not None]
        if key is not None and called:  # the run of a candidate's workflow
            return self._side(views.run(self._database, called[-1], _MOST_BYTES), output, None)
        attempts = [one for step in steps for one in view.attempts.get(step.id, []) if one.outcome == "succeeded"]
        times = [(one.finished_at - one.started_at).total_seconds() for one in attempts if one.finished_at is not None]
        costs = [one.cost for one in attempts if one.cost is not None]
        firsts = [one.first_token_ms for one in attempts if one.first_token_ms is not None]
        scores = [
            float(step.output["score"])
            for step in steps
            if step.kind in ("verify", "refine", "ensemble")
            and isinstance(step.output, Mapping)
            and isinstance(step.output.get("score"), int | float)
        ]
        return PairSide(
            text,
            tools,
            sum(one.tokens_in or 0 for one in attempts),
            sum(one.tokens_out or 0 for one in attempts),
            sum(times) or None,
            min(firsts) / 1000 if firsts else None,
            sum(costs) if costs else None,
            sum(scores) / len(scores) if scores else None,
            finish,
        )

    # -- checks -----------------------------------------------------------------------------------------------------

    def _name(self, model: str) -> str | None:
        found = self._catalog().resolve(model)
        return None if found is None else found.name

    def _unknown(self, given: ShadowDefinition) -> list[Problem]:
        """What the shadow names that does not exist, or may not be done again."""
        names = self._catalog().names
        options = given.compare
        places = {
            "model": given.model,
            "candidate.model": given.tried.model,
            "compare.similarity": options.similarity,
            "compare.judge": options.judge,
        }
        found = [
            Problem(where, f"there is no model {name!r}", ", ".join(names))
            for where, name in places.items()
            if name is not None and self._name(name) is None
        ]
        if given.workflow is None:
            return found
        for namespace in given.namespaces or (None,):
            scope = {} if namespace is None else {"namespace": namespace}
            try:
                version = registry.get(self._database, given.workflow, given.tried.version, **scope)
                _require_harmless(version.definition)
            except NotFound as error:
                found.append(Problem("candidate.version", str(error), "a stored version of the workflow"))
            except InvalidInput as error:
                found += error.problems
        return found


def _require_harmless(given: Definition) -> None:
    """Raise InvalidInput for a workflow that would do something outside of its run a second time."""
    acting = [step.id for step in given.all_steps() if step.kind not in HARMLESS or work_of(step).kind not in HARMLESS]
    if acting:
        message = f"its steps {', '.join(acting[:10])} act outside of the run, and would act twice"
        raise InvalidInput([Problem("workflow", message, ", ".join(sorted(HARMLESS)))], "shadow")


def _is_judged(run_id: UUID, share: float) -> bool:
    return run_id.int % 10_007 < share * 10_007


def _question_of(request: Mapping[str, Any]) -> str:
    """The last thing that a user said, or the prompt."""
    messages = request.get("messages")
    if not isinstance(messages, list):
        return str(request.get("prompt", ""))
    said = [one.get("content") for one in messages if isinstance(one, Mapping) and one.get("role") == "user"]
    last = said[-1] if said else ""
    if isinstance(last, list):
        last = " ".join(str(part.get("text", "")) for part in last if isinstance(part, Mapping))
    return str(last or "")


def _better(output: Any) -> str | None:
    return output.get("better") if isinstance(output, Mapping) else None


def _vectors(output: Any) -> Any:
    """The vectors of an `embed` step."""
    return output.get("vectors") if isinstance(output, Mapping) else output

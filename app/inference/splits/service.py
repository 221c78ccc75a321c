"""
The service of splits: start, end, change and show them; and the pass that reads outcomes, ramps up and rolls back.

A pass takes the splits one by one, each in a transaction of its own; two processes never work on the same one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from app.catalog.catalog import Catalog
from app.inference.splits import definition, evidence, judgement, store, table
from app.inference.splits.definition import SplitCandidate, SplitDefinition, SplitMetric
from app.inference.splits.evidence import SplitVerdict, VariantSample
from app.inference.splits.judgement import VariantSamples
from app.inference.splits.rows import SplitState, StoredSplit
from app.kernel import ids
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import Conflict, InvalidInput, NotFound, Problem
from app.workflows import registry
from app.workflows.language.overrides import with_models
from app.workflows.language.source import SourceDocument

#: Most splits that run at the same time, and scores of one run.
MAX_RUNNING, MAX_SCORES = 100, 16


@dataclass(frozen=True, slots=True)
class SplitEnd:
    """A split that a pass has ended."""

    name: str
    state: SplitState
    reason: str
    #: The model whose calls it divided; None for one of runs.
    model: str | None


@dataclass(frozen=True, slots=True)
class SplitPass:
    """What a pass has done."""

    outcomes: int = 0
    ramped: tuple[str, ...] = ()
    ended: tuple[SplitEnd, ...] = ()

    @property
    def changes_assignments(self) -> bool:
        """Whether other processes must read the splits again."""
        return bool(self.ramped or self.ended)


class Splits:
    """The service. Who changes something tells the other processes (`app.kernel.live.notices`)."""

    def __init__(self, database: Database, catalog: Callable[[], Catalog]) -> None:
        self._database, self._catalog = database, catalog

    def start(self, work: UnitOfWork, document: object, author: str) -> StoredSplit:
        """
        Start a split. Raises InvalidInput with every problem, Conflict when the name is taken, or when another running
        split divides the same.
        """
        given = definition.parse(document)
        problems = self._unknown(given)
        if problems:
            raise InvalidInput(problems, "split")
        store.lock_all(work)
        if store.get(work, given.split) is not None:
            raise Conflict(
                f"there is a split {given.split!r}: its outcomes are its own; remove it, or take another name"
            )
        running = store.running(work)
        if len(running) >= MAX_RUNNING:
            raise Conflict(f"{MAX_RUNNING} splits run, which is the most: stop one")
        for one in running:
            if self._meet(given, definition.parse(one.definition)):
                raise Conflict(f"the split {one.name!r} divides the same {given.kind} already: stop it first")
        return store.insert(work, ids.new_id(), given, author)

    def stop(self, work: UnitOfWork, name: str, reason: str, state: SplitState = SplitState.STOPPED) -> StoredSplit:
        """End a split. Raises NotFound, and Conflict when it has ended before."""
        found = self._locked(work, name)
        store.end(work, found.id, state, reason)
        return self._of(work, name)

    def set_share(self, work: UnitOfWork, name: str, share: float) -> StoredSplit:
        """Set the share of each candidate. Raises NotFound, Conflict, InvalidInput."""
        found = self._locked(work, name)
        most = definition.parse(found.definition).most
        if not 0 < share <= most + 1e-9:
            message = f"{share:g} is not possible for each candidate"
            raise InvalidInput([Problem("share", message, f"more than 0, at most {most:g}")], "split")
        store.set_share(work, found.id, share)
        return self._of(work, name)

    def remove(self, work: UnitOfWork, name: str) -> None:
        """Remove a split that has ended, with its outcomes. Raises NotFound, Conflict while it runs."""
        found = store.get(work, name, lock=True)
        if found is None:
            raise NotFound("split", name)
        if found.state == SplitState.RUNNING:
            raise Conflict(f"the split {name!r} runs: stop it first")
        store.delete(work, found.id)

    def get(self, name: str) -> StoredSplit:
        """Return a split. Raises NotFound."""
        with self._database.work() as work:
            return self._of(work, name)

    def advance(self) -> SplitPass:
        """Read new outcomes of all running splits, ramp up those whose stage is over, and end those that must end."""
        with self._database.work() as work:
            running = [one.id for one in store.running(work)]
        outcomes, ramped, ended = 0, [], []
        for id_ in running:
            with self._database.work() as work:
                found = store.lock_running(work, id_)
                if found is None:
                    continue
                given = definition.parse(found.definition)
                new = store.collect(work, found, judgement.variants_of(given), given.score)
                outcomes += new
                sampled = store.samples(work, id_)
                end = _ending(given, sampled)
                if end is not None:
                    store.end(work, id_, end.state, end.reason)
                    ended.append(end)
                elif _may_ramp(work, found, given, sampled):
                    store.set_stage(work, id_, found.stage + 1)
                    ramped.append(found.name)
        return SplitPass(outcomes, tuple(ramped), tuple(ended))

    def _locked(self, work: UnitOfWork, name: str) -> StoredSplit:
        found = store.get(work, name, lock=True)
        if found is None:
            raise NotFound("split", name)
        if found.state != SplitState.RUNNING:
            raise Conflict(f"the split {name!r} has ended: {found.state}")
        return found

    def _of(self, work: UnitOfWork, name: str) -> StoredSplit:
        found = store.get(work, name)
        if found is None:
            raise NotFound("split", name, [one.name for one in store.page(work, 50)])
        return found

    def _meet(self, one: SplitDefinition, other: SplitDefinition) -> bool:
        if one.namespaces and other.namespaces and not {*one.namespaces} & {*other.namespaces}:
            return False
        if one.workflow is not None:
            return one.workflow == other.workflow
        return other.model is not None and self._name(one.model) == self._name(other.model)

    def _name(self, model: str | None) -> str | None:
        found = self._catalog().resolve(model or "")
        return model if found is None else found.name

    def _unknown(self, given: SplitDefinition) -> list[Problem]:
        """What the split names that does not exist."""
        catalog = self._catalog()
        places = {"model": given.model}
        for at, candidate in enumerate(given.candidates):
            places[f"candidates.{at}.model"] = candidate.model
            places |= {f"candidates.{at}.models.{step}": name for step, name in candidate.models.items()}
        found = [
            Problem(where, f"there is no model {name!r}", ", ".join(catalog.names))
            for where, name in places.items()
            if name is not None and catalog.resolve(name) is None
        ]
        if given.workflow is None:
            return found
        for namespace in given.namespaces or (None,):
            for at, candidate in enumerate(given.candidates):
                found += self._unknown_runs(given.workflow, candidate, f"candidates.{at}", namespace)
        return found

    def _unknown_runs(
        self, workflow: str, candidate: SplitCandidate, where: str, namespace: str | None
    ) -> list[Problem]:
        scope = {} if namespace is None else {"namespace": namespace}
        try:
            version = registry.get(self._database, workflow, candidate.version, **scope)
        except NotFound as error:
            field = "workflow" if candidate.version is None else f"{where}.version"
            return [Problem(field, str(error), "a stored workflow, and one of its versions")]
        try:
            with_models(SourceDocument(version.definition.document(), {}), candidate.models)
        except InvalidInput as error:
            return [Problem(f"{where}.{one.where}", one.message, one.accepted) for one in error.problems]
        return []


def _ending(given: SplitDefinition, samples: VariantSamples) -> SplitEnd | None:
    for candidate in given.candidates:
        broken = judgement.broken_guard(given, samples, candidate.name)
        if broken is not None:
            return SplitEnd(given.split, SplitState.ROLLED_BACK, broken, given.model)
    if not given.goal.stop:
        return None
    verdicts = {
        one.name: judgement.evidence_of(given, samples, one.name, given.goal.metric).verdict for one in given.candidates
    }
    if SplitVerdict.UNDECIDED in verdicts.values():
        return None
    reason = ", ".join(f"{name} is {verdict}" for name, verdict in verdicts.items())
    return SplitEnd(given.split, SplitState.DECIDED, f"{given.goal.metric}: {reason}", given.model)


def _may_ramp(
    work: UnitOfWork,
    found: StoredSplit,
    given: SplitDefinition,
    samples: VariantSamples,
) -> bool:
    """Whether the stage is over: it has lasted, and each candidate has been seen often enough for its guards."""
    if found.share is not None or found.stage >= len(given.ramp) - 1:
        return False
    hold = given.ramp[found.stage].hold
    assert hold is not None, "only the last stage has none"
    units = (samples.get((one.name, SplitMetric.ERROR), VariantSample()).units for one in given.candidates)
    return min(units) >= evidence.LEAST_UNITS and store.is_stage_over(work, found.id, hold.total_seconds())


def share_of(found: StoredSplit) -> float:
    """Return the part of the traffic that each candidate of a split gets, or got last."""
    return table.active(found).share


def roll_back(work: UnitOfWork, name: str | None, model: str | None, reason: str, catalog: Catalog) -> list[str]:
    """
    End the running split of that name, or those that divide the calls of a model or send some to it: everything goes to
    their controls. Returns their names.
    """
    ended = []
    for one in store.running(work):
        given = definition.parse(one.definition)
        models = [given.model, *(candidate.model for candidate in given.candidates)]
        names = {found.name for other in models if other is not None and (found := catalog.resolve(other)) is not None}
        is_meant = one.name == name if name is not None else model in names
        if is_meant and store.end(work, one.id, SplitState.ROLLED_BACK, reason):
            ended.append(one.name)
    return ended

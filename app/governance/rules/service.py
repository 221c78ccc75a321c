"""
The rule service: store, show, switch on and off, remove, and test against history.

Each change of a document is a new version. The built-in rules are stored like all others; a changed one stays as it was
changed, and removing it brings the built-in version back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.governance.actions import action as actions
from app.governance.rules import check, readings, store
from app.governance.rules.builtin import builtin_rules
from app.governance.rules.firing import Firing, FiringState
from app.governance.rules.history import HistoryPoint, HistoryTest, replay
from app.governance.rules.readings import Wanted
from app.governance.rules.rule import Rule, RuleAction
from app.governance.rules.store import INSTALLATION, StoredRule, StoredVersion
from app.governance.signals import store as signal_store
from app.governance.signals.rows import HOUR, MINUTE
from app.governance.signals.sample import Aggregate
from app.governance.signals.store import KEPT, SignalQuery
from app.kernel import ids, log
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import Conflict, InvalidInput, NotFound, Problem
from app.workflows.language.source import SourceDocument

_log = log.get(__name__)

#: Who wrote a version.
BUILTIN, FILE, USER = "builtin", "file", "user"
#: The shortest and the longest history of a test.
MIN_HISTORY, MAX_HISTORY = timedelta(minutes=10), KEPT[HOUR]


@dataclass(frozen=True, slots=True)
class RuleView:
    """A rule with what it does now."""

    stored: StoredRule
    #: Firings of it that are open.
    firing: int
    pending: int
    last_fired_at: datetime | None

    @property
    def state(self) -> str:
        """`off`, `firing`, `pending` or `quiet`."""
        if not self.stored.enabled:
            return "off"
        return "firing" if self.firing else "pending" if self.pending else "quiet"


@dataclass(frozen=True, slots=True)
class RuleService:
    """The operations on rules."""

    database: Database
    max_rules: int
    #: The namespace of the rules that are named; empty for those over the whole installation.
    namespace: str = INSTALLATION

    def parse(self, document: SourceDocument) -> Rule:
        """Return a rule of this namespace. Raises InvalidInput with every problem found."""
        return check.check(document, self.namespace, self._action_problems)

    def put(self, rule: Rule, author: str, source: str = USER, *, enabled: bool | None = None) -> tuple[RuleView, bool]:
        """
        Store a rule that was checked, under its name. The second value is False when it replaced another one.

        `enabled` switches it on or off; by default a new rule is on, and a changed one as it was. The same document is
        not stored twice.

        Raises Conflict beyond the limit of rules.
        """
        with self.database.work() as work:
            store.lock_name(work, self.namespace, rule.rule)
            found = store.find(work, self.namespace, rule.rule)
            if found is None:
                if store.count(work, self.namespace) >= self.max_rules:
                    raise Conflict(f"there are {self.max_rules} rules already, the setting rules.max_rules; remove one")
                on = True if enabled is None else enabled
                store.insert(work, _new(self.namespace, rule, source, enabled=on), author)
            else:
                if found.document != rule.document() or found.source != source:
                    store.new_version(work, found.id, source, rule.document(), author)
                if enabled is not None and enabled != found.enabled:
                    store.enable(work, found.id, enabled=enabled)
        _log.info("rule_stored", rule=rule.rule, namespace=self.namespace, source=source)
        return self.get(rule.rule), found is None

    def get(self, name: str) -> RuleView:
        """Return a rule. Raises NotFound."""
        with self.database.work() as work:
            return _views(work, [self._find(work, name)])[0]

    def all(self, namespace: str | None) -> list[RuleView]:
        """Return the rules of a namespace, or all, by name."""
        with self.database.work() as work:
            return _views(work, store.listed(work, namespace))

    def enable(self, name: str, *, enabled: bool) -> RuleView:
        """Switch a rule on or off; the firings of one that is off are cleared. Raises NotFound."""
        with self.database.work() as work:
            store.lock_name(work, self.namespace, name)
            found = self._find(work, name)
            store.enable(work, found.id, enabled=enabled)
        _log.info("rule_switched", rule=name, namespace=self.namespace, enabled=enabled)
        return self.get(name)

    def delete(self, name: str, author: str) -> None:
        """
        Remove a rule; of a built-in one, what was changed. Its firings are cleared by the next evaluation.

        Raises NotFound, and Conflict for a built-in rule that was not changed.
        """
        with self.database.work() as work:
            store.lock_name(work, self.namespace, name)
            found = self._find(work, name)
            built_in = builtin_rules().get(name) if self.namespace == INSTALLATION else None
            if built_in is None:
                store.delete(work, found.id)
            elif found.source == BUILTIN:
                raise Conflict(f"the rule {name!r} is built in; switch it off: arriero rules disable {name}")
            else:
                store.new_version(work, found.id, BUILTIN, built_in.document(), author)
        _log.info("rule_removed", rule=name, namespace=self.namespace)

    def versions(self, name: str, limit: int) -> list[StoredVersion]:
        """Return the versions of a rule, the newest first. Raises NotFound."""
        with self.database.work() as work:
            return store.versions(work, self._find(work, name).id, limit)

    def firings(
        self, namespace: str | None, rule: str | None, state: FiringState | None, before: UUID | None, limit: int
    ) -> list[Firing]:
        """Return firings, the newest first."""
        with self.database.work() as work:
            return store.firings(work, namespace, rule=rule, state=state, before=before, limit=limit)

    def firing(self, firing_id: UUID, namespace: str | None) -> Firing:
        """Return a firing, of one namespace or of any. Raises NotFound."""
        with self.database.work() as work:
            found = store.firing(work, firing_id, namespace)
        if found is None:
            raise NotFound("firing", str(firing_id))
        return found

    def test(self, rule: Rule, last: timedelta) -> HistoryTest:
        """Return when a rule would have fired in the last time. Raises InvalidInput."""
        if not MIN_HISTORY <= last <= MAX_HISTORY:
            raise InvalidInput([Problem("last", f"{last} is out of range", "from 10m to 31d")], "query")
        resolution = MINUTE if last <= KEPT[MINUTE] else HOUR
        with self.database.work() as work:
            now: datetime = work.rows(text("SELECT now() AS now"))[0].now
            points = {
                wanted: _points(work, wanted, last, resolution)
                for wanted in readings.queries(rule, self.namespace, known=False)
            }
        return replay(rule, self.namespace, points, now - last, now, timedelta(minutes=resolution))

    def _find(self, work: UnitOfWork, name: str) -> StoredRule:
        found = store.find(work, self.namespace, name)
        if found is None:
            raise NotFound("rule", name, [one.name for one in store.listed(work, self.namespace)])
        return found

    def _action_problems(self, action: RuleAction, where: str) -> Iterable[Problem]:
        document = {"action": action.action, "with": dict(action.options)}
        try:
            actions.parse([document], self.namespace, where)
        except InvalidInput as error:
            for problem in error.problems:
                yield Problem(problem.where.replace(f"{where}[0]", where), problem.message, problem.accepted)


def ensure_builtin(database: Database) -> None:
    """Store the built-in rules that are not stored, and those of another version that nobody has changed."""
    with database.work() as work:
        stored = {one.name: one for one in store.listed(work, INSTALLATION)}
    for name, rule in builtin_rules().items():
        found = stored.get(name)
        if found is not None and (found.source != BUILTIN or found.document == rule.document()):
            continue
        with database.work() as work:
            store.lock_name(work, INSTALLATION, name)
            found = store.find(work, INSTALLATION, name)
            if found is None:
                store.insert(work, _new(INSTALLATION, rule, BUILTIN, enabled=True), "arriero")
            elif found.source == BUILTIN and found.document != rule.document():
                store.new_version(work, found.id, BUILTIN, rule.document(), "arriero")


def read_file(rules: RuleService, path: Path) -> list[Rule]:
    """Return the rules of a file. Raises InvalidInput with every problem found, and OSError."""
    problems: list[Problem] = []
    found: list[Rule] = []
    for document in check.parse(path.read_text("utf-8")):
        try:
            found.append(rules.parse(document))
        except InvalidInput as error:
            problems += error.problems
    if problems:
        raise InvalidInput(problems, f"rules in {path}")
    return found


def apply_files(rules: RuleService, found: Mapping[str, Rule], author: str) -> None:
    """Store the rules of all files where they differ; remove those that came from a file and are in none any more."""
    with rules.database.work() as work:
        stored = {one.name: one for one in store.listed(work, INSTALLATION)}
    for name, one in stored.items():
        if one.source == FILE and name not in found:
            rules.delete(name, author)
    for name, rule in found.items():
        known = stored.get(name)
        if known is None or known.source != FILE or known.document != rule.document():
            rules.put(rule, author, FILE)


def _new(namespace: str, rule: Rule, source: str, *, enabled: bool) -> StoredRule:
    unknown: Any = None  # the database knows the time
    return StoredRule(ids.new_id(), namespace, rule.rule, 1, source, enabled, rule.document(), unknown, unknown)


def _views(work: UnitOfWork, found: Sequence[StoredRule]) -> list[RuleView]:
    counts = store.open_counts(work)
    fired = store.last_fired(work, [one.id for one in found])
    return [RuleView(one, *counts.get(one.id, (0, 0)), fired.get(one.id)) for one in found]


def _points(work: UnitOfWork, wanted: Wanted, last: timedelta, resolution: int) -> list[HistoryPoint]:
    window = last + wanted.window + wanted.ended + timedelta(minutes=resolution)
    query = SignalQuery(wanted.signal, window, dict(wanted.where), wanted.by)
    return [
        HistoryPoint(
            point.at,
            point.group,
            Aggregate(
                point.value.observations,
                point.value.weight,
                point.value.total,
                point.value.least,
                point.value.greatest,
                dict(point.value.histogram),
            ),
        )
        for point in signal_store.points(work, query, resolution)
    ]

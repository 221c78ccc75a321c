"""
The evaluator: it reads the windows that the rules need, decides, and makes each change in a transaction of its own.

A window that several rules read is read once. `decide_all` changes nothing but what is remembered of conditions;
`apply` makes one transition. Both name the revision that was read, so of two control workers one makes a change, and
its hooks are called once. A hook that fails undoes its transition, which the next evaluation decides again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import text

from app.governance.rules import active_hours, check, readings, store
from app.governance.rules.evaluation import Decision, FiringChange, RuleMemory, RulePhase, decide, stop
from app.governance.rules.firing import Firing, FiringHooks, FiringState
from app.governance.rules.readings import Wanted
from app.governance.rules.rule import Rule
from app.governance.rules.store import RuleState, StoredRule
from app.governance.signals import store as signal_store
from app.governance.signals.sample import WindowValue
from app.governance.signals.store import SignalQuery
from app.kernel import ids, log
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import InvalidInput

_log = log.get(__name__)

#: The watermark of the evaluation: when it last was, and since when it has been without a long break.
_WATERMARK = "evaluate:rules"
_MARK = text("""
    INSERT INTO signal_watermark (name, at, state) VALUES (:name, now(), jsonb_build_object('since', now()))
    ON CONFLICT (name) DO UPDATE SET at = now(), state = CASE
        WHEN now() - signal_watermark.at > CAST(:longest AS interval) THEN jsonb_build_object('since', now())
        ELSE signal_watermark.state END
    RETURNING at, CAST(state ->> 'since' AS timestamptz) AS since
""")


@dataclass(frozen=True, slots=True)
class Transition:
    """A change that an evaluation decided."""

    before: RuleState
    decision: Decision
    #: The rule and its document; None for a firing of a rule that was removed.
    stored: StoredRule | None
    rule: Rule | None


@dataclass(frozen=True, slots=True)
class RuleEvaluator:
    """Evaluates all rules."""

    database: Database
    hooks: Sequence[FiringHooks]
    #: A longer time between two evaluations is a break, which counts for no condition.
    longest_break: timedelta

    def decide_all(self) -> list[Transition]:
        """
        Evaluate all rules, and return the transitions to apply, those of rules of a higher priority first.

        A rule that this version cannot read is logged and left out. Raises DatabaseUnreachable.
        """
        with self.database.work() as work:
            mark = work.rows(_MARK, {"name": _WATERMARK, "longest": self.longest_break})[0]
            rules = list(_readable(store.evaluated(work)))
            remembered = store.states(work)
            found = _read(work, [(stored, rule) for stored, rule in rules if stored.enabled])
            orphans = store.orphans(work)
        decided = [
            (stored, rule, state, decision)
            for stored, rule in rules
            for state, decision in _decisions(stored, rule, remembered.get(stored.id, {}), found, mark.at, mark.since)
        ]
        self._remember([(state, decision.memory) for _, _, state, decision in decided if decision.change is None])
        transitions = [
            Transition(state, decision, stored, rule) for stored, rule, state, decision in decided if decision.change
        ]
        transitions.sort(key=lambda one: -one.rule.priority if one.rule else 0)
        return [*transitions, *(_of_orphan(firing) for firing in orphans)]

    def apply(self, transition: Transition) -> Firing | None:
        """
        Make a transition, and call the hooks in its transaction.

        Returns the firing that began to fire or was cleared; None when another process was first, or nothing fired.
        """
        with self.database.work() as work:
            firing = _make(work, transition)
            if firing is None:
                return None
            for hook in self.hooks if not firing.dry_run else ():
                if firing.state is FiringState.FIRING:
                    hook.on_firing(work, firing)
                else:
                    hook.on_cleared(work, firing)
        return firing

    def _remember(self, changed: Sequence[tuple[RuleState, RuleMemory]]) -> None:
        """Store what is remembered of conditions, where it changed."""
        kept = [
            (state, memory)
            for state, memory in changed
            if memory != state.memory and (state.revision or not memory.is_empty)
        ]
        if kept:
            with self.database.work() as work:
                for state, memory in kept:
                    store.change_state(work, state, memory, state.firing_id)


def _readable(stored: Sequence[StoredRule]) -> Iterator[tuple[StoredRule, Rule]]:
    for one in stored:
        try:
            yield one, check.stored(one.document)
        except InvalidInput as error:
            _log.warning("rule_unreadable", rule=one.name, namespace=one.namespace, error=str(error))


def _read(work: UnitOfWork, rules: Sequence[tuple[StoredRule, Rule]]) -> dict[Wanted, dict[str, WindowValue]]:
    wanted = {query for stored, rule in rules for query in readings.queries(rule, stored.namespace)}
    return {
        query: signal_store.read(
            work,
            SignalQuery(
                query.signal,
                query.window,
                dict(query.where),
                query.by,
                query.ended,
                quantiles=query.quantiles,
                latest=query.latest,
            ),
        )
        for query in wanted
    }


def _decisions(
    stored: StoredRule,
    rule: Rule,
    remembered: dict[str, RuleState],
    found: dict[Wanted, dict[str, WindowValue]],
    now: datetime,
    since: datetime,
) -> Iterator[tuple[RuleState, Decision]]:
    """Yield what is decided for each value of the rule's label."""
    active = active_hours.is_active(rule.schedule, now)
    values = readings.groups(rule, stored.namespace, found, remembered) if stored.enabled else list(remembered)
    for value in values:
        state = remembered.get(value) or RuleState(stored.id, value, 0, RuleMemory(stored.version), None)
        if not stored.enabled:
            yield state, stop(state.memory, "the rule was switched off")
        elif bool(rule.by) != bool(value):
            yield state, stop(state.memory, "the rule was changed")
        else:
            seen = readings.readings(rule, stored.namespace, value, found, since, now)
            decision = decide(rule, stored.version, state.memory, seen, now, since, active=active)
            yield state, _without_old_cooldown(decision, rule, now)


def _without_old_cooldown(decision: Decision, rule: Rule, now: datetime) -> Decision:
    """Forget when the last firing began, once the cooldown is over and nothing else is remembered."""
    memory = decision.memory
    if memory.is_empty and memory.fired_at is not None and now - memory.fired_at >= rule.cooldown:
        memory = RuleMemory(memory.version)
        return Decision(memory, decision.change, decision.reason, decision.values)
    return decision


def _of_orphan(firing: Firing) -> Transition:
    change = FiringChange.CLEARED if firing.state is FiringState.FIRING else FiringChange.CEASED
    state = RuleState(firing.rule_id, "", 0, RuleMemory(phase=RulePhase.QUIET), firing.id)
    return Transition(state, Decision(RuleMemory(), change, "the rule was removed"), None, None)


def _make(work: UnitOfWork, transition: Transition) -> Firing | None:
    before, decision = transition.before, transition.decision
    firing_id, firing = before.firing_id, None
    if transition.stored is None or transition.rule is None:
        assert firing_id is not None, "an orphan is a firing"
        return _end(work, decision, firing_id)
    if decision.change in (FiringChange.BEGAN, FiringChange.FIRED) and firing_id is None:
        firing_id = ids.new_id()
    keeps = decision.memory.phase is not RulePhase.QUIET
    if not store.change_state(work, before, decision.memory, firing_id if keeps else None):
        return None  # another process was first
    if decision.change in (FiringChange.CEASED, FiringChange.CLEARED):
        return None if firing_id is None else _end(work, decision, firing_id)
    assert firing_id is not None, "it was made above"
    state = FiringState.FIRING if decision.change is FiringChange.FIRED else FiringState.PENDING
    if before.firing_id is not None:
        firing = _promote(work, before.firing_id, decision)
    else:
        firing = store.begin_firing(
            work, firing_id, transition.stored, transition.rule, before.value, state, decision.reason, decision.values
        )
    return firing if firing is not None and firing.state is FiringState.FIRING else None


def _promote(work: UnitOfWork, firing_id: Any, decision: Decision) -> Firing | None:
    pending = store.firing(work, firing_id)
    return None if pending is None else store.fire(work, pending, decision.reason, decision.values)


def _end(work: UnitOfWork, decision: Decision, firing_id: Any) -> Firing | None:
    if decision.change is FiringChange.CEASED:
        store.drop(work, firing_id)
        return None
    return store.clear(work, firing_id, decision.reason)

"""RuleService are evaluated on signals in the database; each firing is acted on once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text

from app.governance.rules import service, store
from app.governance.rules.builtin import builtin_rules
from app.governance.rules.evaluator import RuleEvaluator
from app.governance.rules.firing import Firing, FiringState
from app.governance.rules.service import RuleService
from app.governance.signals.sample import Sample, SignalLabels
from app.governance.signals.store import SignalStore
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import Conflict, InvalidInput, NotFound
from app.workflows.language.source import SourceDocument
from workers.governance import evaluation

HIGH = {"signal": "error_rate", "operator": ">", "threshold": 0.5}


class Recorder:
    """Hooks that write down what they are called for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, str]] = []
        self.fails = False

    def on_firing(self, work: UnitOfWork, firing: Firing) -> None:
        assert firing.state is FiringState.FIRING
        self._note(work, "fired", firing)

    def on_cleared(self, work: UnitOfWork, firing: Firing) -> None:
        assert firing.state is FiringState.CLEARED
        self._note(work, "cleared", firing)

    def _note(self, work: UnitOfWork, what: str, firing: Firing) -> None:
        work.after_commit(lambda: self.calls.append((what, firing.rule.rule, "".join(firing.labels.values()))))
        if self.fails:
            raise RuntimeError("the hook has a defect")


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def put(database: Database, name: str = "r", namespace: str = "", **fields: Any) -> None:
    rules = RuleService(database, 100, namespace)
    document = {"rule": name, "category": "quality", "all": [HIGH], "cooldown": 0, **fields}
    rules.put(rules.parse(SourceDocument(document, {})), "test")


def evaluator(database: Database, *hooks: Recorder) -> RuleEvaluator:
    return RuleEvaluator(database, hooks, timedelta(minutes=5))


def evaluate(database: Database, *hooks: Recorder) -> dict[str, int]:
    return evaluation.evaluate(evaluator(database, *hooks))


def write(database: Database, failed: float, count: int = 1, **labels: str) -> None:
    SignalStore(database).write([Sample("error_rate", failed, SignalLabels(**labels))] * count)


def open_firings(database: Database) -> list[Firing]:
    with database.work() as work:
        return [one for one in store.firings(work, None) if one.state is not FiringState.CLEARED]


def remembered(database: Database) -> int:
    with database.work() as work:
        return int(work.rows(text("SELECT count(*) AS n FROM rule_state"))[0].n)


def test_a_model_that_fails_fires_once_and_clears_when_it_works(database: Database, recorder: Recorder) -> None:
    put(database, by="model")
    write(database, 1, model="bad")
    write(database, 0, model="good")
    for _ in range(3):
        evaluate(database, recorder)
    assert recorder.calls == [("fired", "r", "bad")]
    (firing,) = open_firings(database)
    assert (firing.labels, firing.values["0"]["value"]) == ({"model": "bad"}, 1.0)
    assert firing.reason == "error_rate is 100 % (mean in 5m), > 50 %"

    write(database, 0, 10, model="bad")
    for _ in range(3):
        evaluate(database, recorder)
    assert recorder.calls == [("fired", "r", "bad"), ("cleared", "r", "bad")]
    assert open_firings(database) == []
    assert remembered(database) == 0


def test_two_control_workers_act_once(database: Database, recorder: Recorder) -> None:
    """Both decide before either one acts: as bad as it can be."""
    put(database, by="model")
    models = [f"m{n}" for n in range(5)]
    for expected, failed, count in (("fired", 1, 1), ("cleared", 0, 10)):
        for model in models:
            write(database, failed, count, model=model)
        decided = [evaluator(database, recorder).decide_all() for _ in range(2)]
        assert [len(transitions) for transitions in decided] == [5, 5]
        barrier = threading.Barrier(2)

        def apply(transitions: Sequence[Any], barrier: threading.Barrier = barrier) -> int:
            barrier.wait(30)
            return sum(evaluator(database, recorder).apply(one) is not None for one in transitions)

        with ThreadPoolExecutor(2) as threads:
            assert sum(threads.map(apply, decided)) == 5
        assert sorted(call for call in recorder.calls if call[0] == expected) == [(expected, "r", m) for m in models]


def test_a_hook_that_fails_is_called_again_and_stops_no_other_rule(database: Database, recorder: Recorder) -> None:
    other = Recorder()
    recorder.fails = True
    put(database)
    write(database, 1)
    assert evaluate(database, other, recorder) == {"fired": 0, "cleared": 0, "failed": 1}
    assert (other.calls, open_firings(database)) == ([], [])
    recorder.fails = False
    assert evaluate(database, other, recorder)["fired"] == 1
    assert recorder.calls == other.calls == [("fired", "r", "")]


def test_dry_run_records_and_does_nothing(database: Database, recorder: Recorder) -> None:
    put(database, dry_run=True)
    write(database, 1)
    assert evaluate(database, recorder)["fired"] == 1
    assert recorder.calls == []
    (firing,) = open_firings(database)
    assert firing.dry_run


def test_a_pending_firing_is_seen_and_leaves_no_trace(database: Database, recorder: Recorder) -> None:
    put(database, **{"for": "10m"})
    write(database, 1)
    evaluate(database, recorder)
    assert [one.state for one in open_firings(database)] == [FiringState.PENDING]
    write(database, 0, 10)
    evaluate(database, recorder)
    with database.work() as work:
        assert store.firings(work, None) == []
    assert (recorder.calls, remembered(database)) == ([], 0)


@pytest.mark.parametrize("end", ["off", "removed", "changed"])
def test_what_fires_is_cleared_when_its_rule_goes(database: Database, recorder: Recorder, end: str) -> None:
    put(database, cooldown="1h")
    write(database, 1)
    evaluate(database, recorder)
    rules = RuleService(database, 100)
    if end == "off":
        rules.enable("r", enabled=False)
    elif end == "removed":
        rules.delete("r", "test")
    else:
        put(database, cooldown="1h", description="another")
    evaluate(database, recorder)
    assert recorder.calls == [("fired", "r", ""), ("cleared", "r", "")]
    with database.work() as work:
        assert end in store.firings(work, None)[0].cleared_reason
    evaluate(database, recorder)
    assert len(recorder.calls) == 2, "the cooldown outlasts a change"


def test_a_rule_of_a_namespace_sees_only_that(database: Database, recorder: Recorder) -> None:
    put(database, namespace="a")
    write(database, 1, 5, namespace="b")
    write(database, 0, namespace="a")
    assert evaluate(database, recorder)["fired"] == 0
    write(database, 1, 5, namespace="a")
    assert evaluate(database, recorder)["fired"] == 1
    assert open_firings(database)[0].namespace == "a"


def test_an_expression_compares_windows(database: Database, recorder: Recorder) -> None:
    put(
        database,
        by="model",
        all=[
            {"expression": "signals.error_rate.count >= 2.0 && signals.error_rate.mean > 0.4 && signals.cost.sum > 1.0"}
        ],
    )
    write(database, 1, 2, model="a")
    assert evaluate(database, recorder)["fired"] == 0, "without a cost there is nothing to compare"
    SignalStore(database).write(
        [Sample("cost", 2, SignalLabels(model="a")), Sample("cost", 2, SignalLabels(model="b"))]
    )
    assert evaluate(database, recorder)["fired"] == 1
    assert recorder.calls == [("fired", "r", "a")]


def test_the_window_before_is_the_one_that_ended_when_this_one_began(database: Database, recorder: Recorder) -> None:
    with database.work() as work:
        now = work.rows(text("SELECT now() AS now"))[0].now
    put(database, all=[{"expression": "signals.tokens.sum > 2.0 * previous.tokens.sum", "window": "10m"}])
    SignalStore(database).write([Sample("tokens", 10, at=now - timedelta(minutes=15)), Sample("tokens", 19)])
    assert evaluate(database, recorder)["fired"] == 0
    SignalStore(database).write([Sample("tokens", 2)])
    assert evaluate(database, recorder)["fired"] == 1


def test_absence_needs_that_somebody_looked(database: Database, recorder: Recorder) -> None:
    put(database, all=[{"signal": "heartbeat_age", "absent": True, "window": "10m"}])
    assert evaluate(database, recorder)["fired"] == 0, "nothing was evaluated before"
    with database.work() as work:
        work.run(
            text("""
            UPDATE signal_watermark SET state = jsonb_build_object('since', now() - interval '11 minutes')
            WHERE name = 'evaluate:rules'
        """)
        )
    assert evaluate(database, recorder)["fired"] == 1
    SignalStore(database).write([Sample("heartbeat_age", 1, SignalLabels(host="h"))])
    assert evaluate(database, recorder)["cleared"] == 1


def test_rules_of_a_higher_priority_come_first(database: Database, recorder: Recorder) -> None:
    for name, priority in (("low", 1), ("high", 99), ("middle", 50)):
        put(database, name, priority=priority)
    write(database, 1)
    evaluate(database, recorder)
    assert [name for _, name, _ in recorder.calls] == ["high", "middle", "low"]


def test_a_rule_that_this_version_cannot_read_stops_no_other(database: Database, recorder: Recorder) -> None:
    put(database)
    put(database, "odd")
    with database.work() as work:
        work.run(text("""UPDATE rule SET document = '{"rule": "odd"}' WHERE name = 'odd'"""))
    write(database, 1)
    assert evaluate(database, recorder)["fired"] == 1


def test_versions_are_kept_and_the_same_document_is_no_new_one(database: Database) -> None:
    rules = RuleService(database, 100)
    for description in ("one", "one", "two"):
        put(database, description=description)
    assert [(one.version, one.document["description"]) for one in rules.versions("r", 10)] == [(2, "two"), (1, "one")]
    assert rules.get("r").stored.version == 2
    with pytest.raises(NotFound, match="no rule 'x'"):
        rules.get("x")
    other = rules.parse(SourceDocument({"rule": "b", "category": "quality", "all": [HIGH]}, {}))
    with pytest.raises(Conflict, match="max_rules"):
        RuleService(database, 1).put(other, "test")


def test_actions_are_checked_with_the_rule(database: Database) -> None:
    with pytest.raises(InvalidInput, match=r"actions\[0\]"):
        put(database, actions=[{"action": "launch_rocket"}])


def test_built_in_rules_return_when_their_change_is_removed(database: Database) -> None:
    rules = RuleService(database, 100)
    service.ensure_builtin(database)
    service.ensure_builtin(database)
    assert {one.stored.name for one in rules.all("")} == set(builtin_rules())
    put(database, "memory-high", description="mine")
    service.ensure_builtin(database)
    assert rules.get("memory-high").stored.document["description"] == "mine"
    rules.delete("memory-high", "test")
    assert rules.get("memory-high").stored.document == builtin_rules()["memory-high"].document()
    with pytest.raises(Conflict, match="built in"):
        rules.delete("memory-high", "test")


def test_a_rule_is_tested_on_what_was_measured(database: Database) -> None:
    with database.work() as work:
        now = work.rows(text("SELECT date_trunc('minute', now()) AS now"))[0].now
    bad = {*range(120, 110, -1), *range(30, 25, -1)}
    SignalStore(database).write(
        [
            Sample("error_rate", float(ago in bad), SignalLabels(model="m"), at=now - timedelta(minutes=ago))
            for ago in range(180, 0, -1)
        ]
    )
    rules = RuleService(database, 100)
    document = {
        "rule": "r",
        "category": "quality",
        "by": "model",
        "all": [{**HIGH, "window": "1m", "for": "3m"}],
        "cooldown": 0,
    }
    found = rules.test(rules.parse(SourceDocument(document, {})), timedelta(hours=4))
    minutes = [round((now - one.fired_at) / timedelta(minutes=1)) for one in found.firings]
    assert minutes == [pytest.approx(116, abs=1.1), pytest.approx(26, abs=1.1)]
    lengths = [(one.cleared_at - one.fired_at) / timedelta(minutes=1) for one in found.firings if one.cleared_at]
    assert lengths == [pytest.approx(7, abs=1.1), pytest.approx(2, abs=1.1)]
    assert (found.evaluations, found.groups) == (240, ("m",))
    assert open_firings(database) == []

"""Actions act once, within limits, and are taken back; what somebody else has changed since is left alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from app.governance.actions import action as actions
from app.governance.actions import service
from app.governance.actions.execution import Cause
from app.kernel import ids
from app.kernel.live import versions
from app.kernel.live.versions import SettingChange
from app.kernel.sections.governance import ActionSettings
from app.scheduler import residencies
from app.scheduler.residencies import Residency
from app.workflows import registry
from app.workflows.language import definition as definitions
from tests.governance.actions.conftest import CAUSE, MODEL, World

OTHER = "gemma3:270m"
FLOW = {"workflow": "report", "steps": [{"id": "wait", "kind": "wait", "for": "1h"}]}


def states(world: World, cause: Cause) -> list[str]:
    return [one.state for one in world.executions(cause)]


@pytest.mark.parametrize(
    ("action", "field", "held"),
    [
        ("pause_model", "paused", (MODEL,)),
        ({"kind": "keep_resident"}, "resident", (MODEL,)),
        ({"kind": "resize_slots", "slots": 2}, "slots", (f"{MODEL}=2",)),
        ({"kind": "switch_fallback", "to": [OTHER]}, "diverted", (f"{MODEL}={OTHER}",)),
        ({"kind": "shed_load", "classes": ["batch", "standard"]}, "shed", ("batch", "standard")),
    ],
)
def test_serving_changes_while_the_rule_fires(world: World, action: Any, field: str, held: tuple[str, ...]) -> None:
    cause = world.fire(action)

    assert getattr(world.serving(), field) == held
    (execution,) = world.executions(cause)
    assert execution.state == "applied"
    (version,) = world.history()
    assert (version.author, version.reason) == ("rule thrash", "rule thrash: 2.1 loads per served step")

    world.clear(cause)
    assert getattr(world.serving(), field) == ()
    assert states(world, cause) == ["undone"]
    world.clear(cause)
    assert len(world.history()) == 2


def test_the_last_rule_that_clears_restores_what_the_first_one_found(world: World) -> None:
    first = world.fire({"kind": "resize_slots", "slots": 2})
    second = world.fire({"kind": "resize_slots", "slots": 1})
    world.clear(first)
    assert world.serving().slots == (f"{MODEL}=1",)
    assert states(world, first) == ["kept"]

    world.clear(second)
    assert world.serving().slots == ()


def test_what_an_operator_has_changed_since_is_left_alone(world: World) -> None:
    cause = world.fire({"kind": "switch_fallback", "to": [OTHER]})
    with world.database.work() as work:
        values = {"serving.diverted": [f"{MODEL}=embeddinggemma:300m"]}
        versions.change(work, world.settings, values, SettingChange("ana", "I know better"))
    world.clear(cause)

    (execution,) = world.executions(cause)
    assert (execution.state, execution.undo_detail) == (
        "kept",
        "serving.diverted has been changed since: it is left as it is",
    )
    assert world.serving().diverted == (f"{MODEL}=embeddinggemma:300m",)


def test_a_rule_that_cleared_before_its_action_was_done_changes_nothing(world: World) -> None:

    cause = replace(CAUSE, firing_id=ids.new_id())
    assert cause.firing_id is not None
    with world.database.work() as work:
        service.fired(work, cause, actions.parse(["pause_model"]), world.settings.actions)
        service.cleared(work, cause.firing_id)
    world.run()

    assert states(world, cause) == ["refused"]
    assert world.history() == []


def test_a_dry_run_says_what_it_would_do_and_does_nothing(world: World) -> None:
    epoch = world.host("h1")
    world.pool("h1", epoch)
    cause = world.fire("pause_model", "evict_idle", "clean_up_memory", cause=replace(CAUSE, dry_run=True))

    found = world.executions(cause)
    assert [one.state for one in found] == ["done"] * 3
    assert found[0].detail == f"dry run: {MODEL} is paused"
    assert found[1].detail.startswith("dry run: 1 idle pools of smollm2:135m stop")
    assert world.history() == []
    assert world.commands() == []


def test_only_idle_pools_that_nothing_wants_are_evicted(world: World) -> None:
    epoch = world.host("h1")
    longest, idle = world.pool("h1", epoch, idle="3 hours"), world.pool("h1", epoch)
    world.pool("h1", epoch, idle="1 second")
    world.pool("h1", epoch, busy=1)
    world.pool("h1", epoch, OTHER)

    cause = world.fire({"kind": "evict_idle", "idle_for": "1m"})
    assert world.commands() == [("stop", MODEL, longest)]
    (execution,) = world.executions(cause)
    assert execution.before == [{"pool": longest, "model": MODEL, "host": "h1", "bytes": 100}]

    world.fire({"kind": "evict_idle", "idle_for": "1m", "max_pools": 5})
    assert world.commands() == [("stop", MODEL, longest), ("stop", MODEL, idle)]


def test_pools_restart_at_a_bounded_rate_whatever_their_ids(world: World) -> None:
    epoch = world.host("h1")
    first, second = world.pool("h1", epoch), world.pool("h1", epoch)
    restart = {"kind": "restart_pool", "max_per_hour": 1}

    done = world.fire({**restart, "pool": first})
    refused = world.fire({**restart, "pool": second[-8:]})

    assert sorted(world.commands(), key=str) == [("start", MODEL, None), ("stop", MODEL, first)]
    assert states(world, done) == ["done"]
    (execution,) = world.executions(refused)
    assert execution.state == "refused"
    assert execution.detail == f"it was done 1 times within an hour for model {MODEL}; its max_per_hour is 1"


def test_all_rules_together_are_bounded(with_settings: Callable[[ActionSettings], World]) -> None:
    world = with_settings(ActionSettings(max_per_hour=2))
    causes = [world.fire({"kind": "scale_pool", "pools": 2, "model": name}) for name in (MODEL, OTHER, "qwen3:0.6b")]

    assert [states(world, cause) for cause in causes] == [["applied"], ["applied"], ["refused"]]


def test_scaling_keeps_what_an_operator_wants(world: World) -> None:
    cause = world.fire({"kind": "scale_pool", "pools": 2})
    assert world.row("SELECT pools, pinned FROM pool_target") == (2, False)
    world.clear(cause)
    assert world.row("SELECT pools FROM pool_target") is None

    world.row("INSERT INTO pool_target (model, pools, pinned) VALUES (:model, 1, true) RETURNING model", model=MODEL)
    cause = world.fire({"kind": "scale_pool", "pools": 3})
    assert world.row("SELECT pools, pinned FROM pool_target") == (3, True)
    world.clear(cause)
    assert world.row("SELECT pools, pinned FROM pool_target") == (1, True)


def test_quarantine_leaves_hosts_that_can_work(world: World) -> None:
    for name in ("h1", "h2", "h3"):
        world.host(name)
    first = world.fire({"kind": "quarantine_host", "host": "h1"})
    second = world.fire({"kind": "quarantine_host", "host": "h2"})

    assert world.row("SELECT state FROM host WHERE name = 'h1'").state == "cordoned"
    assert states(world, second) == ["refused"]
    world.clear(first)
    assert world.row("SELECT state FROM host WHERE name = 'h1'").state == "schedulable"


def test_the_last_host_is_never_quarantined(world: World) -> None:
    world.host("h1")
    cause = world.fire({"kind": "quarantine_host", "host": "h1"})

    (execution,) = world.executions(cause)
    assert execution.detail == "h1 is the last host on which pools can be placed"


def test_a_residency_is_stored_and_taken_back(world: World) -> None:
    epoch = world.host("h1")
    pool = world.pool("h1", epoch)
    before = Residency(timedelta(minutes=1), frozenset({pool}))
    with world.publisher.connection() as client:
        residencies.store(client, MODEL, before)
    cause = world.fire({"kind": "keep_resident", "pinned": False, "keep_alive": "2h"})

    with world.publisher.connection() as client:
        assert residencies.read(client)[MODEL].keep == timedelta(hours=2)
        world.clear(cause)
        assert residencies.read(client)[MODEL] == before


def test_a_workflow_is_paused_while_the_rule_fires_and_another_one_runs_once(world: World) -> None:
    registry.put(world.database, "report", definitions.from_document(FLOW))
    cause = world.fire({"kind": "pause_workflow", "workflow": "report"}, {"kind": "run_workflow", "workflow": "report"})

    paused, started = world.executions(cause)
    assert (paused.target, paused.before, paused.state) == ("workflow default/report", False, "applied")
    assert world.row("SELECT name FROM workflow_pause").name == "report"
    run = world.row("SELECT id::text AS id, priority, labels->>'rule' AS rule FROM run")
    assert started.after == {"run_id": run.id}
    assert (run.priority, run.rule) == ("batch", "thrash")
    # A worker that died before it recorded the run: the next one submits it again, and gets the same.
    world.row(
        "UPDATE action_execution SET state = 'pending', due_at = now() WHERE id = :id RETURNING id", id=started.id
    )
    world.run()
    assert world.row("SELECT count(*) AS runs FROM run").runs == 1

    world.clear(cause)
    assert world.row("SELECT name FROM workflow_pause") is None


def test_two_control_workers_never_act_twice(world: World) -> None:
    epoch = world.host("h1")
    for _ in range(6):
        world.pool("h1", epoch)
    causes = []
    for number in range(8):
        cause = replace(CAUSE, firing_id=ids.new_id())
        causes.append(cause)
        with world.database.work() as work:
            wanted = [{"kind": "evict_idle", "max_per_hour": 3}, {"kind": "resize_slots", "slots": number + 1}]
            service.fired(work, cause, actions.parse(wanted), world.settings.actions)
    done = []
    threads = [threading.Thread(target=lambda: done.append(world.run())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sum(done) == 16
    pools = [pool for command, _, pool in world.commands()]
    assert len(pools) == len(set(pools)) == 3
    for cause in causes:
        world.clear(cause)
    assert world.serving().slots == ()


def test_an_action_that_fails_is_tried_three_times_and_stops_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(world.runner().context), "database", property(lambda self: self.runs.database))
    world.moved = None  # type: ignore[assignment] # what the effect reads of it raises
    cause = world.fire("clean_up_memory", "pause_model")
    for _ in range(2):
        world.row("UPDATE action_execution SET due_at = now() WHERE state = 'pending' RETURNING id")
        world.run()

    failed, paused = world.executions(cause)
    assert (failed.state, failed.detail[:14]) == ("failed", "AttributeError")
    assert paused.state == "applied"


def test_an_unknown_model_is_refused(world: World) -> None:
    cause = world.fire({"kind": "pause_model", "model": "nowhere"})

    (execution,) = world.executions(cause)
    assert (execution.state, execution.detail) == ("refused", "the catalogue has no model 'nowhere'")


def test_a_clean_up_replaces_idle_pools_that_leak_and_no_others(world: World) -> None:
    epoch = world.host("h1")
    sound, leaking, working = world.pool("h1", epoch), world.pool("h1", epoch), world.pool("h1", epoch, busy=1)
    world.row("INSERT INTO pool_target (model, pools, pinned) VALUES (:model, 3, false) RETURNING model", model=MODEL)
    for pool, used in ((sound, 100), (leaking, 180), (working, 500)):
        world.row(
            """UPDATE pool_process SET used = jsonb_build_object('h1/cpu', CAST(:used AS int))
            WHERE pool_id = CAST(:id AS uuid) RETURNING pool_id""",
            id=pool,
            used=used,
        )

    (execution,) = world.executions(world.fire("clean_up_memory"))
    assert world.commands() == [("stop", MODEL, leaking)], execution.detail


def test_what_is_kept_loaded_is_not_evicted(world: World) -> None:
    epoch = world.host("h1")
    world.pool("h1", epoch)
    world.fire("keep_resident")
    (execution,) = world.executions(world.fire({"kind": "evict_idle", "idle_for": "1m"}))
    assert (execution.state, world.commands()) == ("refused", [])


def test_a_clean_up_looks_at_each_device(world: World) -> None:
    """A full device is cleaned up, however empty the others of its host are."""
    epoch = world.host("h1")
    pool = world.pool("h1", epoch)
    world.row("UPDATE device SET capacity_bytes = 120 WHERE id = 'h1/cpu' RETURNING id")
    world.row(
        """INSERT INTO device SELECT (jsonb_populate_record(device,
            '{"id": "h1/sim", "charged_bytes": 0, "capacity_bytes": 100000}')).* FROM device RETURNING id"""
    )
    (execution,) = world.executions(world.fire({"kind": "clean_up_memory", "until": 0.7}))
    assert world.commands() == [("stop", MODEL, pool)], execution.detail
    assert execution.before == {"reserved": 0.8333}
    assert execution.after["reserved"] == 0.0

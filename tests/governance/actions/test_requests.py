"""Actions are requested with the firing, once, and their taking back with its end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from app.governance.actions import action as actions
from app.governance.actions import service, store
from app.governance.actions.action import ActionKind
from app.governance.actions.execution import Cause
from app.kernel import ids
from app.kernel.database import Database
from app.kernel.errors import InvalidInput
from app.kernel.sections.governance import ActionSettings

CAUSE = Cause("memory-high", "memory utilisation 0.91 > 0.8", labels={"model": "smollm2:135m", "host": "here"})


def test_every_kind_has_a_class() -> None:
    assert set(actions.CLASSES) == set(ActionKind)


def test_an_action_is_the_same_after_it_was_written_and_read() -> None:
    given = [
        {"kind": "evict_idle", "idle_for": "1h30m"},
        {"action": "switch_fallback", "with": {"model": "a", "to": ["b"]}},
        "clean_up_memory",
    ]
    found = actions.parse(given)

    documents = [actions.document_of(one) for one in found]
    assert documents[0] == {"kind": "evict_idle", "idle_for": "1h30m"}
    assert actions.parse(documents) == found


@pytest.mark.parametrize(
    ("given", "where", "says"),
    [
        ("explode", "actions[0].kind", "clean_up_memory"),
        ({"kind": 1}, "actions[0].kind", "clean_up_memory"),
        ({}, "actions[0].kind", "clean_up_memory"),
        ({"kind": "resize_slots"}, "actions[0].slots", "an integer from 1 to 256"),
        ({"kind": "resize_slots", "slots": "2"}, "actions[0].slots", "an integer from 1 to 256"),
        ({"kind": "alert", "chanels": []}, "actions[0].chanels", "channels"),
        ({"kind": "alert", "repeat": "1s"}, "actions[0].repeat", "1m"),
        ({"kind": "shed_load", "classes": ["interactive"]}, "actions[0].classes.0", "batch"),
        ({"action": "alert", "with": 3}, "actions[0]", "`action` and `with`"),
        ({"kind": "run_workflow", "workflow": "x", "inputs": {"a": "b" * 20_000}}, "actions[0].inputs", "bytes"),
        (7, "actions[0]", "kind"),
    ],
)
def test_a_problem_names_the_parameter_and_what_is_accepted(given: Any, where: str, says: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        actions.parse([given])

    problem, *_ = raised.value.problems
    assert problem.where == where
    assert says in str(problem)


def test_a_rule_of_a_namespace_may_not_touch_what_all_share() -> None:
    with pytest.raises(InvalidInput, match="only a rule without a namespace"):
        actions.parse(["quarantine_host"], "acme")
    assert actions.parse(["alert"], "acme")


def test_a_firing_has_its_actions_once_however_often_it_is_heard(database: Database) -> None:
    cause = replace(CAUSE, firing_id=ids.new_id())
    wanted = actions.parse(["pause_model", "alert", "quarantine_host", {"kind": "restart_pool", "pool": "abc"}])
    for _ in range(2):
        with database.work() as work:
            service.fired(work, cause, wanted, ActionSettings())

    with database.work() as work:
        found = store.page(work, None, None, None, None, 10)
    assert sorted((one.kind, one.target, one.position) for one in found) == [
        ("pause_model", "model smollm2:135m", 0),
        ("quarantine_host", "host here", 2),
        ("restart_pool", "pool abc", 3),
    ]


def test_an_action_without_a_target_is_refused_with_the_reason(database: Database) -> None:
    with database.work() as work:
        service.fired(work, replace(CAUSE, labels={}), actions.parse(["pause_model"]), ActionSettings())
        (found,) = store.page(work, None, None, None, None, 10)

    assert (found.state, found.detail) == ("refused", "neither the action nor the labels of the firing name a model")


def test_nothing_is_requested_while_actions_are_off(database: Database) -> None:
    with database.work() as work:
        service.fired(work, CAUSE, actions.parse(["pause_model"]), ActionSettings(mode="off"))
        service.fired(work, CAUSE, actions.parse(["pause_model"]), ActionSettings(mode="dry_run"))
        (found,) = store.page(work, None, None, None, None, 10)
    assert found.dry_run

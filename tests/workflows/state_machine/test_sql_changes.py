"""Every SQL statement that writes a state is listed, and makes the transitions that it is listed with."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from app.kernel.database import Database, UnitOfWork
from app.workflows.runs import views
from app.workflows.runs.service import Runs
from app.workflows.state_machine.sql_changes import SQL_CHANGES, SqlChange
from app.workflows.state_machine.states import FINAL_STEPS, RunState, StepState
from app.workflows.state_machine.transitions import RUN_TRANSITIONS, TRANSITIONS
from tests.workflows.runs.test_service import submit

ROOT = Path(__file__).parents[3]
RUNS = "app.workflows.runs"
#: `UPDATE step ... SET ... state = ...` and `INSERT INTO step (..., state, ...)`; the same for runs.
WRITES = (
    re.compile(
        r"\bUPDATE\s+(?:step|run)\b(?:\s+AS\s+\w+)?\s+SET\s(?:(?!\bWHERE\b|\bFROM\b).)*?\bstate\s*=", re.S | re.I
    ),
    re.compile(r"\bINSERT\s+INTO\s+(?:step|run)\s*\([^)]*\bstate\b", re.S | re.I),
)


def texts(node: ast.AST) -> str:
    """All literal text of a node: that of f-strings, too."""
    return " ".join(n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str))


def written() -> set[str]:
    """The statements of the application that write states, as module and name; or module and line."""
    found = set()
    for folder in ("app", "workers"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            module = path.relative_to(ROOT).as_posix().removesuffix(".py").replace("/", ".").removeprefix(f"{RUNS}.")
            source = path.read_text()
            if "state" not in source or not re.search("update|insert", source, re.IGNORECASE):
                continue
            for node in ast.parse(source).body:
                if any(pattern.search(texts(node)) for pattern in WRITES):
                    named = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
                    name = node.targets[0].id if named else f"line {node.lineno}"  # type: ignore[attr-defined] # `named` says that it is a name
                    found.add(f"{module}.{name}")
    return found


def test_every_statement_that_writes_a_state_is_listed() -> None:
    assert written() == {change.statement for change in SQL_CHANGES}


def test_the_search_finds_what_it_is_for() -> None:
    for statement in (
        "UPDATE step SET state = 'ready' WHERE id = 1",
        "update run set paused = false, state = 'failed'",
        "UPDATE step AS copy SET output = NULL, state = 'pending' FROM step AS old",
        "INSERT INTO run (id, state) VALUES (1, 'queued')",
    ):
        assert any(pattern.search(statement) for pattern in WRITES), statement
    for statement in (
        "UPDATE step SET lease_until = now() WHERE state = 'running'",
        "UPDATE run SET paused = true FROM step WHERE step.state = 'ready'",
        "INSERT INTO history (run_id, state) VALUES (1, 'ready')",
    ):
        assert not any(pattern.search(statement) for pattern in WRITES), statement


@pytest.mark.parametrize("change", SQL_CHANGES, ids=lambda change: change.statement)
def test_the_transitions_of_a_statement_are_in_the_tables(change: SqlChange) -> None:
    assert change.steps <= set(TRANSITIONS)
    assert [edge for edge in change.runs if edge[1] not in RUN_TRANSITIONS[edge[0]]] == []


def statement(change: SqlChange) -> Any:
    module, _, name = f"{RUNS}.{change.statement}".rpartition(".")
    return getattr(importlib.import_module(module), name)


def put_steps(work: UnitOfWork, run_id: UUID, parent_id: UUID | None) -> dict[UUID, StepState]:
    """A step, or an item of a map, in every state."""
    insert = text("""
        INSERT INTO step (id, run_id, parent_id, item, key, position, kind, model_index, queue, priority, rank, state,
                          delegated, attempt, failures, losses, tokens_in, tokens_out, owner, lease_until)
        SELECT :id, :run_id, CAST(:parent_id AS uuid), CASE WHEN :parent_id IS NOT NULL THEN :n END, :key, 0, 'noop', 0,
               'io', 'standard', 1, CAST(:state AS text), false, 1, 0, 0, 0, 0,
               CASE WHEN :state IN ('running', 'cancelling') THEN 'w' END,
               CASE WHEN :state IN ('running', 'cancelling') THEN now() END
    """)
    put = {uuid4(): state for state in StepState}
    for n, (id_, state) in enumerate(put.items()):
        values = {"id": id_, "run_id": run_id, "parent_id": parent_id, "n": n, "key": f"k{n}", "state": state}
        work.run(insert, values)
    return put


def moved(work: UnitOfWork, put: Mapping[UUID, StepState]) -> set[tuple[StepState, StepState]]:
    rows = work.rows(text("SELECT id, state FROM step WHERE id = ANY(:ids)"), {"ids": list(put)})
    return {(put[row.id], StepState(row.state)) for row in rows if put[row.id] != row.state}


@pytest.mark.parametrize(
    "change", [c for c in SQL_CHANGES if c.steps and "forks" not in c.statement], ids=lambda change: change.statement
)
def test_a_statement_makes_the_transitions_of_steps_that_it_is_listed_with(
    change: SqlChange, runs: Runs, database: Database
) -> None:
    """It is executed on steps in every state."""
    run_id = submit(runs)
    parent = views.run(database, run_id).steps[0].id
    with database.work() as work:
        put = put_steps(work, run_id, parent if "items." in change.statement else None)
        count = len(put)
        if "agent_items." in change.statement:
            work.run(text("UPDATE step SET kind = 'agent', state = 'pending' WHERE id = :id"), {"id": parent})
            work.run(text("UPDATE step SET kind = 'turn' WHERE parent_id = :id AND item = 0"), {"id": parent})
        common = {
            "run_id": run_id,
            "id": parent,
            "parent_id": parent,
            "count": count,
            "owner": "w",
            "lease": timedelta(seconds=1),
        }
        reset = {"texts": ["1"] * count, "refs": [None] * count, "sizes": [1] * count, "model": None, "queue": "io"}
        for id_ in put if change.statement.endswith("_CLAIM") else [parent]:
            of = run_id if change.statement.startswith("recovery") else id_
            work.run(statement(change), common | reset | {"id": of, "attempt": 1})
        listed = {(old, TRANSITIONS[old, what]) for old, what in change.steps}
        assert moved(work, put) == {(old, new) for old, new in listed if old != new}


@pytest.mark.parametrize("change", [c for c in SQL_CHANGES if c.runs], ids=lambda change: change.statement)
def test_a_statement_makes_the_transitions_of_runs_that_it_is_listed_with(
    change: SqlChange, runs: Runs, database: Database
) -> None:
    """It is executed on runs in every state."""
    made = set()
    for state in RunState:
        run_id = submit(runs)
        with database.work() as work:
            work.run(
                text("""
                    UPDATE run SET state = CAST(:state AS text),
                        finished_at = CASE WHEN :state IN ('succeeded', 'failed', 'cancelled') THEN now() END
                    WHERE id = :id
                """),
                {"id": run_id, "state": state},
            )
            (step,) = work.rows(text("SELECT id FROM step WHERE run_id = :id AND state = 'ready'"), {"id": run_id})
            of = step.id if change.statement.endswith("_CLAIM") else run_id
            values = {"id": of, "attempt": 1, "owner": "w", "lease": timedelta(seconds=1), "error": "{}"}
            work.run(statement(change), values)
            (row,) = work.rows(text("SELECT state FROM run WHERE id = :id"), {"id": run_id})
            made.add((state, RunState(row.state)))
    assert {(old, new) for old, new in made if old != new} == change.runs


def test_a_fork_copies_steps_and_items_in_the_states_that_are_listed(runs: Runs, database: Database) -> None:
    listed = {change.statement: change for change in SQL_CHANGES}
    steps, items = listed["forks._COPY_STEPS"], listed["forks._COPY_ITEMS"]
    old_id, new_id = submit(runs), submit(runs)
    with database.work() as work:
        work.run(text("DELETE FROM step WHERE run_id = :id"), {"id": new_id})
        old, new = put_steps(work, old_id, None), put_steps(work, new_id, None)
        work.run(
            text("UPDATE step SET state = 'pending', owner = NULL, lease_until = NULL WHERE run_id = :id"),
            {"id": new_id},
        )
        values = {"run_id": new_id, "old_id": old_id, "keys": [f"k{n}" for n in range(len(old))]}
        work.run(statement(steps), values)
        rows = work.rows(text("SELECT state FROM step WHERE id = ANY(:ids)"), {"ids": list(new)})
        moves = {(StepState.PENDING, StepState(row.state)) for row in rows if row.state != "pending"}
        assert moves == {(before, TRANSITIONS[before, what]) for before, what in steps.steps}

        map_id = next(id_ for id_, state in old.items() if state is StepState.SUCCEEDED)
        for n, state in enumerate(FINAL_STEPS):
            put_item(work, old_id, map_id, n, state)
        assert work.run(statement(items), values) == len(FINAL_STEPS)
        copied = work.rows(text("SELECT state FROM step WHERE run_id = :id AND item IS NOT NULL"), {"id": new_id})
        assert {row.state for row in copied} == items.created


def put_item(work: UnitOfWork, run_id: UUID, map_id: UUID, n: int, state: StepState) -> None:
    insert = text("""
        INSERT INTO step (id, run_id, parent_id, item, key, position, kind, model_index, queue, priority, rank, state,
                          delegated, attempt, failures, losses, tokens_in, tokens_out)
        VALUES (gen_random_uuid(), :run_id, :parent_id, :n, :key, 0, 'noop', 0, 'io', 'standard', 1, :state, false, 1,
                0, 0, 0, 0)
    """)
    work.run(insert, {"run_id": run_id, "parent_id": map_id, "n": n, "key": f"item[{n}]", "state": state})

"""The table of a reservation's states: every change of a state follows one of its edges."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.fleet.ledger.reservation import TRANSITIONS, ReservationEvent, ReservationState

ROOT = Path(__file__).parents[3]
LEDGER = "app/fleet/ledger"
#: The statements that write the state of a reservation, and whose outcome they write.
STATEMENTS = {
    (f"{LEDGER}/session.py", "_INSERT"): "a claim that `rules.claim` granted: held",
    (f"{LEDGER}/session.py", "_UPDATE"): "edges between held, active and suspect, taken in `rules._after`",
    (f"{LEDGER}/session.py", "_RELEASE"): "edges to released: `rules._put` took the reservation out of the ledger",
}
#: Functions that make a reservation, or replace its state, and the state that they give it.
FUNCTIONS = {
    (f"{LEDGER}/rules.py", "claim"): "the first state: held",
    (f"{LEDGER}/rules.py", "_after"): "the state that the table names",
    (f"{LEDGER}/session.py", "_reservations"): "the state of the row that is read",
}
_WRITES_STATE = re.compile(
    r"\bUPDATE\s+(?:ONLY\s+)?reservation\b(?!_).*?\bSET\b.*?\bstate\s*=|\bINSERT\s+INTO\s+reservation\b(?!_)",
    re.IGNORECASE | re.DOTALL,
)


def modules() -> Iterator[tuple[str, ast.Module]]:
    """The modules that speak of reservations."""
    for folder in ("app", "workers"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            source = path.read_text()
            if "reservation" in source.lower():
                yield path.relative_to(ROOT).as_posix(), ast.parse(source)


def texts_of(node: ast.AST) -> str:
    """All string constants below a node, the parts of formatted strings included."""
    return "".join(
        part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)
    )


def name_of(node: ast.stmt) -> str:
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return getattr(node, "name", "")


def test_only_the_ledger_session_writes_the_state_of_a_reservation() -> None:
    found = {
        (path, name_of(node)) for path, tree in modules() for node in tree.body if _WRITES_STATE.search(texts_of(node))
    }

    assert found == STATEMENTS.keys()


def test_only_the_rules_give_a_reservation_a_state() -> None:
    found = set()
    for path, tree in modules():
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            for call in ast.walk(function):
                if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
                    continue
                sets_state = path.startswith(LEDGER) and any(keyword.arg == "state" for keyword in call.keywords)
                if call.func.id == "Reservation" or (call.func.id == "replace" and sets_state):
                    found.add((path, function.name))

    assert found == FUNCTIONS.keys()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE reservation SET state = 'active'",
        "update reservation set lease_until = now(),\n  state = :state",
        "INSERT INTO reservation (id, state) VALUES (1, 'held')",
    ],
)
def test_the_search_finds_a_statement_that_writes_a_state(statement: str) -> None:
    assert _WRITES_STATE.search(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE reservation_device SET bytes = 1",
        "SELECT FROM reservation WHERE state = 'held'",
        "INSERT INTO reservation_device VALUES (1)",
    ],
)
def test_the_search_passes_over_other_statements(statement: str) -> None:
    assert not _WRITES_STATE.search(statement)


def test_no_edge_leads_back_from_released() -> None:
    assert not [state for state, _ in TRANSITIONS if state is ReservationState.RELEASED]
    assert {event for _, event in TRANSITIONS} == set(ReservationEvent)


@pytest.mark.parametrize("event", [ReservationEvent.EXPIRE, ReservationEvent.HOST_LOST, ReservationEvent.RELEASE])
def test_no_charged_reservation_is_refused_what_happens_without_its_holder(event: ReservationEvent) -> None:
    charged = set(ReservationState) - {ReservationState.RELEASED}
    assert {state for state, other in TRANSITIONS if other is event} == charged

"""What an agent does next follows from its items alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.inference.requests import ChatMessage, ToolCall
from app.workflows.language.agent import CALL, TURN, AgentFields
from app.workflows.state_machine.states import StepState
from workers.tool_loop.decision import STOPS, AgentEnd, AgentFailure, DoAgain, DoCalls, DoTurn, decide
from workers.tool_loop.record import FORM, LAST, TOOLS, OfferedTool, Opening, Record, RecordedItem, opening_of

START = datetime(2026, 1, 1, tzinfo=UTC)
LOOK = OfferedTool("look", "Looks", {"type": "object"}, 0)
OPENING = Opening([ChatMessage("user", "?")], [LOOK], ["careful"], "u", "c")
VALUE = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def agent(**more: Any) -> AgentFields:
    tool = {"name": "look", "description": "Looks", "http": {"url": "https://a.example"}}
    given_fields = {"kind": "agent", "model": "smollm2:135m", "prompt": "?", "tools": [tool]}
    return AgentFields.model_validate(given_fields | more)


def record(*items: tuple[str, Any]) -> Record:
    """The record of turns, `("turn", text or number of calls)`, and of calls, `("call", result or error)`."""
    made = []
    for n, (kind, said) in enumerate(items):
        times = {"ready_at": START + n * timedelta(seconds=1), "finished_at": START + (n + 1) * timedelta(seconds=1)}
        given_input: dict[str, Any] = {"tool": "look", "arguments": {}} if kind == CALL else {"mode": kind}
        if n == 0:
            given_input["opening"] = OPENING.document()
        if isinstance(said, Exception):
            reason, message = said.args
            error = {"reason": reason, "message": message}
            made.append(
                RecordedItem(n, TURN if kind != CALL else CALL, StepState.FAILED, given_input, error=error, **times)
            )
            continue
        calls = [{"name": "look", "arguments": {"n": i}} for i in range(said)] if isinstance(said, int) else []
        output = said if kind == CALL else {"text": "" if calls else said, "tool_calls": calls}
        name = CALL if kind == CALL else TURN
        made.append(RecordedItem(n, name, StepState.SUCCEEDED, given_input, output, None, 100, 0.5, **times))
    return Record(made)


def failed(reason: str, message: str = "no") -> Exception:
    return Exception(reason, message)


def test_calls_follow_a_turn_and_a_turn_follows_calls() -> None:
    assert decide(agent(), record((TOOLS, 2))) == DoCalls([{"name": "look", "arguments": {"n": n}} for n in (0, 1)])
    assert decide(agent(), record((TOOLS, 1), (CALL, "x"))) == DoTurn(TOOLS)
    assert decide(agent(), record((TOOLS, 1), (CALL, failed("http_5xx")))) == DoTurn(TOOLS)
    assert decide(agent(), record((TOOLS, 1), (CALL, "x"), (TOOLS, "It is x."))) == AgentEnd("answer", "It is x.")


def test_the_last_turn_has_no_tools() -> None:
    two = agent(limits={"turns": 2})
    assert decide(two, record((TOOLS, 1), (CALL, "x"))) == DoTurn(LAST)
    assert decide(two, record((TOOLS, 1), (CALL, "x"), (LAST, "x"))) == AgentEnd("turns", "x")


@pytest.mark.parametrize(
    ("limits", "stopped_by"),
    [
        ({"tokens": 200}, "tokens"),
        ({"cost": 0.9}, "cost"),
        ({"time": "2s"}, "time"),
        ({"invalid_calls": 1}, "invalid_calls"),
    ],
)
def test_a_bound_ends_the_agent_with_its_name(limits: dict[str, Any], stopped_by: str) -> None:
    items = record((TOOLS, 1), (CALL, failed("invalid_request") if "invalid_calls" in limits else "x"))
    assert decide(agent(limits=limits), items) == AgentEnd(stopped_by, None)
    assert decide(agent(), items) == DoTurn(TOOLS)


def test_calls_beyond_the_bound_are_not_made() -> None:
    assert decide(agent(limits={"calls": 1}), record((TOOLS, 2))) == AgentEnd("calls", None)


def test_a_turn_that_fails_for_good_is_the_failure_unless_the_context_is_full() -> None:
    found = decide(agent(), record((TOOLS, failed("engine_error", "it broke"))))
    assert found == AgentFailure("turn 1 of the model did not succeed: it broke")
    full = record((TOOLS, "so far"), (TOOLS, failed("context_exceeded")))
    assert decide(agent(), full) == AgentEnd("context", "so far")


def test_items_that_a_retry_has_reset_are_done_again() -> None:
    items = record((TOOLS, 1)).items
    assert decide(agent(), Record([*items, RecordedItem(1, CALL, StepState.PENDING, {})])) == DoAgain()


def test_an_answer_gets_its_form() -> None:
    formed = agent(output={"schema": VALUE})
    assert decide(formed, record((TOOLS, '{"n": 1}'))) == AgentEnd("answer", '{"n": 1}', {"n": 1})
    assert decide(formed, record((TOOLS, "one"))) == DoTurn(FORM)
    assert decide(formed, record((TOOLS, "one"), (FORM, '{"n": 1}'))) == AgentEnd("answer", '{"n": 1}', {"n": 1})
    assert isinstance(decide(formed, record((TOOLS, "one"), (FORM, "two"))), AgentFailure)


def test_messages_follow_from_the_items() -> None:
    items = record((TOOLS, 2), (CALL, "x" * 500), (CALL, failed("http_5xx", "it is down")), (LAST, "Done."))
    first, *rest = items.messages(100)
    assert first == ChatMessage("user", "?")
    calls = (ToolCall("look", {"n": 0}), ToolCall("look", {"n": 1}))
    assert rest[0] == ChatMessage("assistant", "", calls)
    assert rest[1].content == f"{'x' * 100}\n[cut: these are the first 100 of 500 characters]"
    assert rest[2] == ChatMessage("tool", "error: it is down")
    assert rest[3].role == "user"
    assert rest[4] == ChatMessage("assistant", "Done.")


def test_calls_of_one_turn_count_once_for_the_time() -> None:
    items = record((TOOLS, 2), (CALL, "x"), (CALL, "y"))
    assert items.took() == timedelta(seconds=3)
    both = [
        RecordedItem(n, CALL, StepState.SUCCEEDED, {}, ready_at=START, finished_at=START + n * timedelta(seconds=1))
        for n in (1, 2)
    ]
    assert Record(both).took() == timedelta(seconds=2)


def test_an_opening_is_read_as_it_was_stored() -> None:
    assert opening_of(OPENING.document()) == OPENING


ANSWERS = st.sampled_from(["calls", "text", "bad call", "failure"])


@given(st.lists(ANSWERS, max_size=60), st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_every_agent_ends_within_its_bounds(said: list[str], turns: int, calls: int, formed: bool) -> None:
    step = agent(limits={"turns": turns, "calls": calls}, **({"output": {"schema": VALUE}} if formed else {}))
    items: list[tuple[str, Any]] = [(LAST if turns == 1 else TOOLS, 1 if turns > 1 else "text")]
    answers = iter([*said, *["text"] * 200])
    for _ in range(200):
        match decide(step, record(*items)):
            case DoTurn(mode):
                answer = next(answers)
                wanted: Any = (
                    1 if answer in ("calls", "bad call") and mode == TOOLS else '{"n": 1}' if mode == FORM else "x"
                )
                items.append((mode, failed("engine_error") if answer == "failure" else wanted))
            case DoCalls(written):
                items += [(CALL, failed("invalid_request") if next(answers) == "bad call" else "x") for _ in written]
            case AgentEnd(stopped_by=stopped_by):
                assert stopped_by in ("answer", *STOPS)
                break
            case AgentFailure():
                break
    else:
        raise AssertionError("the agent does not end")
    assert sum(kind != CALL for kind, _ in items) <= turns + formed
    assert sum(kind == CALL for kind, _ in items) <= calls

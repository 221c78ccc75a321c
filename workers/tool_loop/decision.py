"""
The decision about what an agent does next: a turn of the model, calls of tools, or its end.

It follows from the record of the items alone: a decision that was lost with its worker is made again, and is the same.
A bound ends the agent with its name as `stopped_by`; only a turn of the model that has failed for good is a failure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app import json_schema
from app.kernel.errors import FailureReason
from app.workflows.language.agent import AgentFields
from app.workflows.state_machine.states import StepState
from workers.tool_loop.record import FORM, LAST, TOOLS, Record

#: Why an agent ended: the model has answered, or one of the bounds.
ANSWER = "answer"
STOPS = ("turns", "calls", "tokens", "time", "cost", "invalid_calls", "context", "history")
#: Most characters of the messages of an agent together.
MAX_HISTORY = 2_000_000


@dataclass(frozen=True, slots=True)
class DoTurn:
    """The model is asked, in that mode."""

    mode: str


@dataclass(frozen=True, slots=True)
class DoCalls:
    """The tools of the last turn are called: `name` and `arguments` of each."""

    calls: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class DoAgain:
    """The items that a retry has reset are done again."""


@dataclass(frozen=True, slots=True)
class AgentEnd:
    """The agent has ended."""

    #: `answer`, or the bound.
    stopped_by: str
    text: str | None
    #: The answer in its form, where the step has one.
    value: Any = None


@dataclass(frozen=True, slots=True)
class AgentFailure:
    """The agent cannot go on."""

    message: str


AgentDecision = DoTurn | DoCalls | DoAgain | AgentEnd | AgentFailure


def decide(agent: AgentFields, record: Record) -> AgentDecision:
    """Return what follows from the record, none of whose items is in progress. It has at least one turn."""
    if any(item.state is StepState.PENDING for item in record.items):
        return DoAgain()
    turn, last = record.turns[-1], record.items[-1]
    if not turn.succeeded:
        return _without_turn(agent, record)
    if last is not turn:
        bound = _bound(agent, record)
        return _next_turn(agent, record) if bound is None else AgentEnd(bound, record.text)
    if turn.calls and turn.input["mode"] == TOOLS:
        if len(record.calls) + len(turn.calls) > agent.limits.calls:
            return AgentEnd("calls", record.text)
        bound = _bound(agent, record)
        return DoCalls(turn.calls) if bound is None else AgentEnd(bound, record.text)
    return _answer(agent, record)


def _next_turn(agent: AgentFields, record: Record) -> DoTurn:
    return DoTurn(LAST if len(record.turns) + 1 >= agent.limits.turns else TOOLS)


def first_mode(agent: AgentFields) -> str:
    """The mode of the first turn."""
    return LAST if agent.limits.turns == 1 else TOOLS


def _without_turn(agent: AgentFields, record: Record) -> AgentDecision:
    turn = record.turns[-1]
    if turn.reason == FailureReason.CONTEXT_EXCEEDED:
        return AgentEnd("context", record.text)
    if turn.reason == FailureReason.TIMEOUT and record.took() >= agent.limits.time:
        return AgentEnd("time", record.text)
    message = (turn.error or {}).get("message") or f"it was {turn.state}"
    return AgentFailure(f"turn {len(record.turns)} of the model did not succeed: {message}")


def _bound(agent: AgentFields, record: Record) -> str | None:
    """The bound that is reached; None while the agent may go on."""
    limits = agent.limits
    if sum(call.was_invalid for call in record.calls) >= limits.invalid_calls:
        return "invalid_calls"
    if limits.tokens is not None and record.tokens() >= limits.tokens:
        return "tokens"
    if limits.cost is not None and record.cost() >= limits.cost:
        return "cost"
    if record.took() >= limits.time:
        return "time"
    if len(record.turns) >= limits.turns:
        return "turns"
    characters = sum(len(message.content) for message in record.messages(limits.result_characters))
    return "history" if characters > MAX_HISTORY else None


def _answer(agent: AgentFields, record: Record) -> AgentDecision:
    """The end of the agent; or, where the answer must have a form and has not, one more turn for that."""
    turn = record.turns[-1]
    text: str = turn.output["text"]
    earlier = record.turns[-2] if turn.input["mode"] == FORM else turn
    stopped_by = "turns" if earlier.input["mode"] == LAST and agent.limits.turns > 1 else ANSWER
    if agent.output is None:
        return AgentEnd(stopped_by, text)
    schema = agent.output.schema_
    try:
        value = turn.output["value"] if "value" in turn.output else json.loads(text)
    except (ValueError, RecursionError):
        value, conforms = None, False
    else:
        conforms = json_schema.conforms(schema, value)
    if conforms:
        return AgentEnd(stopped_by, text, value)
    if turn.input["mode"] == FORM:
        return AgentFailure("the answer does not conform to output.schema")
    bound = _bound(agent, record)
    return DoTurn(FORM) if bound in (None, "turns") else AgentEnd(bound or ANSWER, text)

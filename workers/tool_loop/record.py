"""
The record of an agent: its items so far, as values, and the messages for the model that follow from them.

The first turn's input has the opening: the messages before the loop, and the tools with their schemas. They are fixed
then, so that a later turn sees what the first one saw. Every other message follows from the output of an item.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from app.inference.requests import ChatMessage, ToolCall
from app.kernel.errors import FailureReason
from app.workflows.language.agent import TURN
from app.workflows.state_machine.states import FINAL_STEPS, StepState

#: How a turn is done: with tools; without them, because it is the last one; or to put the answer into its form.
TOOLS, LAST, FORM = "tools", "last", "form"
#: What the model is told in a turn of that mode.
PROMPTS: Mapping[str, str] = {
    LAST: "No tool can be called any more. Answer now, with what is known.",
    FORM: "Give this answer again as JSON, in the required form.",
}
#: Outputs of called workflows with more bytes are not read for the messages.
MAX_OUTPUT = 1_000_000


@dataclass(frozen=True, slots=True)
class OfferedTool:
    """A tool as it is offered to the model."""

    name: str
    description: str
    #: The JSON Schema of the arguments.
    parameters: Mapping[str, Any]
    #: The place of its definition among the tools of the step.
    at: int
    #: What a grammar enforces, where that cannot be all of `parameters`; the rest is checked after the call.
    enforced: Mapping[str, Any] | None = None

    def document(self) -> dict[str, Any]:
        """The tool, as it is stored."""
        found = {"name": self.name, "description": self.description, "parameters": self.parameters, "at": self.at}
        return found if self.enforced is None else {**found, "enforced": self.enforced}


@dataclass(frozen=True, slots=True)
class Opening:
    """What is fixed before the first turn."""

    messages: Sequence[ChatMessage]
    tools: Sequence[OfferedTool]
    #: What was noticed, for the output.
    warnings: Sequence[str] = ()
    #: To whom memories belong.
    user: str | None = None
    #: The id of the conversation.
    conversation: str | None = None

    def document(self) -> dict[str, Any]:
        """The opening, as it is stored."""
        return {
            "messages": stored(self.messages),
            "tools": [tool.document() for tool in self.tools],
            "warnings": list(self.warnings),
            "user": self.user,
            "conversation": self.conversation,
        }


def opening_of(stored: Mapping[str, Any]) -> Opening:
    """The opening of the input of the first turn."""
    return Opening(
        [_message(one) for one in stored["messages"]],
        [OfferedTool(**tool) for tool in stored["tools"]],
        stored["warnings"],
        stored["user"],
        stored["conversation"],
    )


@dataclass(frozen=True, slots=True)
class RecordedItem:
    """A turn of the model, or a call of a tool."""

    index: int
    kind: str
    state: StepState
    input: Mapping[str, Any]
    output: Any = None
    error: Mapping[str, Any] | None = None
    tokens: int = 0
    cost: float = 0.0
    ready_at: datetime | None = None
    finished_at: datetime | None = None

    @property
    def succeeded(self) -> bool:
        """Whether it has ended well."""
        return self.state is StepState.SUCCEEDED

    @property
    def is_turn(self) -> bool:
        """Whether it is a turn of the model."""
        return self.kind == TURN

    @property
    def reason(self) -> str:
        """Why it has failed; empty where it has not."""
        return str((self.error or {}).get("reason", ""))

    @property
    def calls(self) -> Sequence[Mapping[str, Any]]:
        """The calls that a turn has written: `name` and `arguments` of each."""
        return self.output["tool_calls"] if self.is_turn and self.succeeded else ()

    @property
    def was_invalid(self) -> bool:
        """Whether it is a call that the model must write otherwise."""
        return not self.is_turn and self.state is StepState.FAILED and self.reason == FailureReason.INVALID_REQUEST


@dataclass(frozen=True, slots=True)
class Record:
    """The items of an agent, in their order."""

    items: Sequence[RecordedItem]
    #: The messages before the loop, while the first turn is done with a conversation.
    assembled: Sequence[ChatMessage] | None = None

    @property
    def turns(self) -> Sequence[RecordedItem]:
        """The turns of the model."""
        return [item for item in self.items if item.is_turn]

    @property
    def calls(self) -> Sequence[RecordedItem]:
        """The calls of tools."""
        return [item for item in self.items if not item.is_turn]

    @property
    def opening(self) -> Opening:
        """What was fixed before the first turn."""
        return opening_of(self.items[0].input["opening"])

    @property
    def beginning(self) -> Sequence[ChatMessage]:
        """The messages before the loop: with a conversation, those that the first turn has assembled."""
        if self.assembled is not None:
            return self.assembled
        first = self.items[0]
        stored = first.output.get("messages") if first.is_turn and first.succeeded else None
        return self.opening.messages if stored is None else [_message(one) for one in stored]

    @property
    def text(self) -> str | None:
        """The last text of the model; None before it has written one."""
        texts = (turn.output["text"] for turn in reversed(self.turns) if turn.succeeded)
        return next((text for text in texts if text), None)

    def tokens(self) -> int:
        """The tokens that all turns and calls have read and written."""
        return sum(item.tokens for item in self.items)

    def cost(self) -> float:
        """The price of all turns and calls."""
        return sum(item.cost for item in self.items)

    def took(self) -> timedelta:
        """The time of the turns and calls, from when they were ready. Calls of one turn count once."""
        total, end = timedelta(0), None
        for item in self.items:
            if item.ready_at is None or item.finished_at is None:
                continue
            began = item.ready_at if end is None else max(item.ready_at, end)
            total += max(item.finished_at - began, timedelta(0))
            end = item.finished_at if end is None else max(end, item.finished_at)
        return total

    def messages(self, result_characters: int) -> list[ChatMessage]:
        """The messages for the next turn."""
        found = list(self.beginning)
        for item in self.items:
            if item.state not in FINAL_STEPS:
                break
            if not item.is_turn:
                found.append(ChatMessage("tool", result_text(item, result_characters)))
            elif item.succeeded:
                if item.input["mode"] in PROMPTS:
                    found.append(ChatMessage("user", PROMPTS[item.input["mode"]]))
                calls = tuple(ToolCall(call["name"], call["arguments"]) for call in item.calls)
                found.append(ChatMessage("assistant", item.output["text"], calls))
        return found


def result_text(item: RecordedItem, most: int) -> str:
    """The result of a call for the model: a text, JSON, or what went wrong; cut where it is too long."""
    if not item.succeeded:
        message = (item.error or {}).get("message") or f"the call was {item.state}"
        return cut(f"error: {message}", most)
    output = item.output
    return cut(output if isinstance(output, str) else json.dumps(output, ensure_ascii=False), most)


def cut(text: str, most: int) -> str:
    """The text, or its beginning with a note that says how much is missing."""
    if len(text) <= most:
        return text
    return f"{text[:most]}\n[cut: these are the first {most} of {len(text)} characters]"


def stored(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages, as they are stored."""
    return [_stored(message) for message in messages]


def _stored(message: ChatMessage) -> dict[str, Any]:
    calls = [{"name": call.name, "arguments": dict(call.arguments)} for call in message.tool_calls]
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    return {**found, "tool_calls": calls} if calls else found


def _message(stored: Mapping[str, Any]) -> ChatMessage:
    calls = tuple(ToolCall(call["name"], call["arguments"]) for call in stored.get("tool_calls", ()))
    return ChatMessage(stored["role"], stored["content"], calls)

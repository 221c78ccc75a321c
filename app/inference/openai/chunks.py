"""
The chunks of a streamed answer: pieces of text, tool calls and log-probabilities as they come.

The whole answer comes last. What was not sent of it follows then, so a reader that joined late misses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.inference.openai import answers, logprobs


@dataclass(slots=True)
class _Sent:
    """What was sent of one choice."""

    #: Whether its first chunk was sent, which has the role.
    begun: bool = False
    #: Characters of its text, and tokens with log-probabilities.
    characters: int = 0
    #: Characters of its thinking.
    reasoning: int = 0
    tokens: int = 0
    #: Characters of the tokens with log-probabilities.
    offset: int = 0
    #: By place, the characters of the arguments of each tool call.
    calls: dict[int, int] = field(default_factory=dict)


class Chunks:
    """Makes the chunks of one answer."""

    def __init__(
        self, kind: str, model: str, run_id: str, created: int, *, includes_usage: bool, echoed: str = ""
    ) -> None:
        self._chat, self._run_id = kind == "chat", run_id
        self._heading = answers.heading(kind, model, run_id, created, whole=False)
        self._includes_usage = includes_usage
        self._echoed = echoed
        #: By index of the choice.
        self._choices: dict[int, _Sent] = {}

    @property
    def model(self) -> str:
        """The model that the chunks name: the one that answers."""
        return str(self._heading["model"])

    @model.setter
    def model(self, name: str) -> None:
        self._heading["model"] = name

    def first(self) -> dict[str, Any]:
        """The first chunk, before any text."""
        return self._begin(0)

    def piece(self, text: str) -> dict[str, Any]:
        """A piece of the first text."""
        self._sent(0).characters += len(text)
        return self._chunk(0, {"content": text})

    def pieces(self, found: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """The chunks of pieces, which have the form of `app.inference.openai.pieces`."""
        for piece in found:
            index = piece["index"]
            sent = self._sent(index)
            if not sent.begun:
                yield self._begin(index)
            delta: dict[str, Any] = {}
            if reasoning := piece.get("reasoning", ""):
                sent.reasoning += len(reasoning)
                delta["reasoning_content"] = reasoning
            if piece["text"] or not (reasoning or "tool_calls" in piece):
                sent.characters += len(piece["text"])
                delta["content"] = piece["text"]
            if calls := piece.get("tool_calls"):
                delta["tool_calls"] = [self._call_delta(sent, index, call) for call in calls]
            yield self._chunk(index, delta, self._logprobs(sent, piece.get("logprobs")))

    def last(self, document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks that end the stream: what was not sent of each choice, its finish reason, and the usage."""
        for choice in document["choices"]:
            index = choice["index"]
            sent = self._sent(index)
            if not sent.begun:
                yield self._begin(index)
            message = choice["message"] if self._chat else {"content": choice["text"]}
            calls = message.get("tool_calls") or ()
            if thought := message.get("reasoning_content", "")[sent.reasoning :]:
                yield self._chunk(index, {"reasoning_content": thought})
            rest = (message.get("content") or "")[sent.characters :]
            # The text of an answer that was cut within a tool call has that call, which was sent as one.
            if rest and (calls or not sent.calls):
                yield self._chunk(index, {"content": rest})
            for place, call in enumerate(calls):
                if place not in sent.calls:
                    yield self._chunk(index, {"tool_calls": [{"index": place, **call}]})
                elif more := call["function"]["arguments"][sent.calls[place] :]:
                    yield self._chunk(index, {"tool_calls": [{"index": place, "function": {"arguments": more}}]})
            yield self._chunk(index, {}, self._rest_of_logprobs(sent, choice["logprobs"]), choice["finish_reason"])
        if self._includes_usage:
            yield {**self._heading, "choices": [], "usage": document["usage"]}

    def _sent(self, index: int) -> _Sent:
        return self._choices.setdefault(index, _Sent())

    def _begin(self, index: int) -> dict[str, Any]:
        sent = self._sent(index)
        sent.begun = True
        if self._chat:
            return self._chunk(index, {"role": "assistant", "content": ""})
        sent.characters = len(self._echoed)
        return self._chunk(index, {"content": self._echoed})

    def _call_delta(self, sent: _Sent, index: int, call: Mapping[str, Any]) -> dict[str, Any]:
        place, function = call["index"], call["function"]
        sent.calls[place] = sent.calls.get(place, 0) + len(function["arguments"])
        if "name" not in function:
            return dict(call)
        return {"index": place, "id": answers.call_id(self._run_id, index, place), "type": "function", **call}

    def _logprobs(self, sent: _Sent, found: Sequence[dict[str, Any]] | None) -> dict[str, Any] | None:
        if not found:
            return None
        sent.tokens += len(found)
        if self._chat:
            return {"content": found, "refusal": None}
        before = sent.offset
        sent.offset += sum(len(one["token"]) for one in found)
        return logprobs.of_completion(found, before)

    def _rest_of_logprobs(self, sent: _Sent, whole: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if whole is None or len(whole["content" if self._chat else "tokens"]) <= sent.tokens:
            return None
        return {name: values and values[sent.tokens :] for name, values in whole.items()}

    def _chunk(
        self, index: int, delta: dict[str, Any], found: dict[str, Any] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        content: dict[str, Any] = {"delta": delta} if self._chat else {"text": delta.get("content", "")}
        choice = {"index": index, **content, "logprobs": found, "finish_reason": finish}
        usage: dict[str, Any] = {"usage": None} if self._includes_usage else {}
        return {**self._heading, "choices": [choice], **usage}

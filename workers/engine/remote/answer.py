"""
The streamed answer of a server: events of bounded length, assembled into a text with its tool calls and usage.

Everything that the server sends is checked: what does not have the form of OpenAI's API is an error of the server.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from time import perf_counter
from typing import Any

from app.inference import answers
from app.inference.requests import FinishReason, Generated, GenerateRequest, ToolCall
from app.kernel.errors import FailureReason, StepFailure

#: Most bytes of one line of a stream, and of all of it.
_MAX_LINE, _MAX_BYTES = 4 * 2**20, 256 * 2**20
#: More tokens than any context has; most characters of what a server said in a message.
_MAX_TOKENS, _SAID = 2**31, 500

#: By the names of the server. All others, such as `tool_calls`, mean that the model ended the text.
_FINISH_REASONS: Mapping[str, FinishReason] = {
    one.value: one for one in (FinishReason.LENGTH, FinishReason.CONTENT_FILTER)
}


class StreamedAnswer:
    """The answer of the server, assembled from the events of its stream."""

    def __init__(self, submitted: float) -> None:
        self._submitted, self._first = submitted, 0.0
        self._parts: list[str] = []
        self._thought: list[str] = []
        #: The thinking since the last time it was taken.
        self.new_reasoning = ""
        self._finish: str | None = None
        self._usage: Mapping[str, Any] = {}
        self._pieces = 0
        self._calls: dict[int, list[str]] = {}

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def add(self, event: Mapping[str, Any]) -> str:
        """Add an event. Returns its text. Raises StepFailure when the event is an error, or has another form."""
        if event.get("error"):
            said = str(event["error"])[:_SAID]
            raise StepFailure(FailureReason.ENGINE_ERROR, f"the server failed: {said}", text=self.text)
        try:
            return self._add(event)
        except (TypeError, AttributeError, ValueError, LookupError):
            said = json.dumps(event)[:_SAID]
            message = f"the server sent an event without the form of OpenAI's API: {said}"
            raise StepFailure(FailureReason.ENGINE_ERROR, message, text=self.text) from None

    def _add(self, event: Mapping[str, Any]) -> str:
        self._usage = dict(event.get("usage") or self._usage)
        new = ""
        for choice in event.get("choices") or ():
            finish = choice.get("finish_reason")
            self._finish = str(finish) if finish else self._finish
            delta = choice.get("delta") or {}
            for call in delta.get("tool_calls") or ():
                said = self._calls.setdefault(int(call.get("index") or 0), ["", ""])
                function = call.get("function") or {}
                said[0] += function.get("name") or ""
                said[1] += function.get("arguments") or ""
            # Servers name it in one of two ways.
            thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
            if not isinstance(thought, str):
                raise TypeError("the thinking is no text")
            self._thought.append(thought)
            self.new_reasoning += thought
            new += delta.get("content") or choice.get("text") or ""
        if new or self.new_reasoning:
            self._first = self._first or perf_counter()
            self._pieces += 1
        if new:
            self._parts.append(new)
        return new

    def take_reasoning(self) -> str:
        """Return the thinking since the last call."""
        new, self.new_reasoning = self.new_reasoning, ""
        return new

    def generated(self, request: GenerateRequest) -> Generated:
        """Return the result. Raises StepFailure when the text or its calls do not conform to the request."""
        if self._finish is None:
            raise StepFailure(FailureReason.ENGINE_ERROR, "the server's stream ended too early", text=self.text)
        now = perf_counter()
        details, written = self._usage.get("prompt_tokens_details"), self._usage.get("completion_tokens_details")
        accepted = _count(written, "accepted_prediction_tokens", 0)
        found = Generated(
            text=self.text,
            finish=_FINISH_REASONS.get(self._finish, FinishReason.STOP),
            tokens_in=_count(self._usage, "prompt_tokens", 0),
            tokens_out=_count(self._usage, "completion_tokens", self._pieces),
            tokens_cached=_count(details, "cached_tokens", 0),
            time_to_first=timedelta(seconds=(self._first or now) - self._submitted),
            time_total=timedelta(seconds=now - self._submitted),
            seed=request.sampling.seed,
            reasoning="".join(self._thought),
            reasoning_tokens=_count(written, "reasoning_tokens", 0),
            tokens_drafted=accepted + _count(written, "rejected_prediction_tokens", 0),
            tokens_accepted=accepted,
        )
        cut_is_kept = request.keeps_cut and found.finish is FinishReason.LENGTH
        if request.schema is not None and not cut_is_kept:
            try:
                answers.require(found.text, request.schema)
            except StepFailure:
                if found.finish is FinishReason.LENGTH:
                    raise answers.cut(request, found.text) from None
                raise
        calls = tuple(self._read_calls())
        answers.require_calls(calls, request, self.text)
        return replace(found, tool_calls=calls)

    def _read_calls(self) -> Iterator[ToolCall]:
        for name, arguments in self._calls.values():
            try:
                yield ToolCall(name, dict(json.loads(arguments or "{}")))
            except (ValueError, TypeError, RecursionError):
                message = f"the arguments of the tool call {name!r} are no JSON object"
                raise StepFailure(FailureReason.INVALID_OUTPUT, message, text=arguments) from None


def _count(usage: Any, name: str, otherwise: int) -> int:
    """Return a number of tokens; a server that sends none, or nonsense, is no reason to lose the text."""
    found = usage.get(name) if isinstance(usage, Mapping) else None
    return found if isinstance(found, int) and 0 <= found < _MAX_TOKENS else otherwise


def events(blocks: Iterator[bytes]) -> Iterator[Mapping[str, Any]]:
    """
    Yield the JSON of each event of a stream until its end.

    Raises StepFailure for an event that is not JSON, and for a line or a stream that is too long.
    """
    for line in _lines(blocks):
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            message = f"the server sent an event that is not JSON: {data[:200].decode(errors='replace')!r}"
            raise StepFailure(FailureReason.ENGINE_ERROR, message) from None
        if isinstance(event, dict):
            yield event


def read(blocks: Iterator[bytes], limit: int, *, cut: bool = False) -> bytes:
    """Return the whole body. One of more than `limit` bytes is cut, or raises StepFailure."""
    found = bytearray()
    for block in blocks:
        found += block
        if len(found) > limit:
            if cut:
                break
            raise StepFailure(FailureReason.ENGINE_ERROR, f"the server's answer has more than {limit:,} bytes")
    return bytes(found[:limit])


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    rest, total = bytearray(), 0
    for block in blocks:
        total += len(block)
        rest += block
        if b"\n" in block:
            *whole, last = bytes(rest).splitlines(keepends=True)
            if last.endswith(b"\n"):
                whole, last = [*whole, last], b""
            yield from whole
            rest = bytearray(last)
        if len(rest) > _MAX_LINE or total > _MAX_BYTES:
            raise StepFailure(FailureReason.ENGINE_ERROR, "the server's stream, or a line of it, is too long")
    if rest:
        yield bytes(rest)

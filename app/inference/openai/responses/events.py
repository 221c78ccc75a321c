"""
The events of a streamed response: the text and the tool calls as they come, and at the end the whole response.

They are made from the same entries as the chunks of a chat completion. Equal entries have equal events with equal
numbers, so a stream can be read again from any of them. What was not sent when the whole answer comes follows then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from app.inference.openai import answers
from app.inference.openai.responses import document
from app.inference.openai.responses.document import ResponseStatus
from app.inference.openai.responses.request import ResponsesRequest

ResponseEvent = dict[str, Any]


class ResponseEvents:
    """Makes the events of one response."""

    def __init__(self, request: ResponsesRequest, run_id: str, created: int) -> None:
        self._request, self._run_id, self._created = request, run_id, created
        self._number = 0
        #: The finished items, and the one that is being written.
        self._output: list[dict[str, Any]] = []
        self._thought: str | None = None
        self._text: _Text | None = None
        #: Characters of the thinking that were sent.
        self._thought_sent = 0
        self._call: _Call | None = None
        #: Calls that were begun.
        self._calls = 0

    @property
    def has_text(self) -> bool:
        """Whether text or a call was sent."""
        return bool(self._thought is not None or self._text or self._call or self._output)

    def begin(self) -> Iterator[ResponseEvent]:
        """The events before any text."""
        if self._request.background:
            yield self._whole("response.created", self._outline(ResponseStatus.QUEUED))
            yield self._whole("response.queued", self._outline(ResponseStatus.QUEUED))
        else:
            yield self._whole("response.created", self._outline(ResponseStatus.IN_PROGRESS))
        yield self._whole("response.in_progress", self._outline(ResponseStatus.IN_PROGRESS))

    def piece(self, text: str, logprobs: Sequence[Mapping[str, Any]] = ()) -> Iterator[ResponseEvent]:
        """A piece of the text."""
        if self._thought is not None:
            yield from self._close("completed")
        if self._text is None:
            self._text = _Text()
            item = document.message_item(self._run_id, "in_progress", [])
            yield self._event("response.output_item.added", output_index=len(self._output), item=item)
            part = document.text_part("")
            yield self._event("response.content_part.added", **self._of_text(), part=part)
        self._text.written += text
        self._text.logprobs += logprobs
        yield self._event("response.output_text.delta", **self._of_text(), delta=text, logprobs=list(logprobs))

    def pieces(self, found: Sequence[Mapping[str, Any]]) -> Iterator[ResponseEvent]:
        """Pieces of the form of `app.inference.openai.pieces`."""
        for piece in found:
            if reasoning := piece.get("reasoning"):
                yield from self._think(reasoning)
            if piece["text"]:
                yield from self.piece(piece["text"], piece.get("logprobs", ()) if self._request.wants_logprobs else ())
            for call in piece.get("tool_calls", ()):
                if "name" in call["function"]:
                    id_ = answers.call_id(self._run_id, 0, call["index"])
                    yield from self._begin_call(call["index"], id_, call["function"]["name"])
                if call["function"]["arguments"]:
                    yield from self._arguments(call["function"]["arguments"])

    def last(self, chat: Mapping[str, Any]) -> Iterator[ResponseEvent]:
        """The events of the end: what was not sent, and the whole response. `chat` is the chat completion."""
        message = chat["choices"][0]["message"]
        if rest := message.get("reasoning_content", "")[self._thought_sent :]:
            yield from self._think(rest)
        calls = message.get("tool_calls") or ()
        was_cut = self._calls > len(calls)
        if not was_cut:
            yield from self._rest(chat, message["content"] or "", calls)
        status = "incomplete" if chat["choices"][0]["finish_reason"] in ("length", "content_filter") else "completed"
        yield from self._close(status)
        whole = document.answered(self._request, self._run_id, chat, self._output)
        yield self._whole(f"response.{whole['status']}", whole)

    def failed(self, reason: str, message: str) -> Iterator[ResponseEvent]:
        """The event of a failure: the response as far as it came."""
        yield from self._close("incomplete")
        whole = document.failed(self._request, self._run_id, self._created, reason, message)
        yield self._whole("response.failed", {**whole, "output": list(self._output)})

    def error(self, code: str | None, message: str) -> ResponseEvent:
        """The event of a stream that breaks off; the response goes on, or is lost."""
        return self._event("error", code=code, message=message, param=None)

    def _rest(self, chat: Mapping[str, Any], text: str, calls: Sequence[Mapping[str, Any]]) -> Iterator[ResponseEvent]:
        """What was not sent of the answer."""
        if not self._calls:
            sent, logprobs = ("", []) if self._text is None else (self._text.written, self._text.logprobs)
            known = (chat["choices"][0]["logprobs"] or {}).get("content") or []
            more = known[len(logprobs) :] if self._request.wants_logprobs else []
            if text[len(sent) :] or more or (self._text is None and not calls and self._thought is None):
                yield from self.piece(text[len(sent) :], more)
        for place, call in enumerate(calls):
            function = call["function"]
            if place >= self._calls:
                yield from self._begin_call(place, call["id"], function["name"])
            if self._call is not None and self._call.place == place:
                rest = function["arguments"][len(self._call.arguments) :]
                if rest:
                    yield from self._arguments(rest)

    def _think(self, text: str) -> Iterator[ResponseEvent]:
        """A piece of the thinking. There is one item of it, at the beginning: what comes later is only in the whole."""
        if self._thought is None and (self._output or self._text or self._call):
            return
        if self._thought is None:
            self._thought = ""
            item = document.reasoning_item(self._run_id, "in_progress", None)
            yield self._event("response.output_item.added", output_index=len(self._output), item=item)
        self._thought += text
        self._thought_sent += len(text)
        yield self._event("response.reasoning_text.delta", **self._of_thought(), delta=text)

    def _begin_call(self, place: int, call_id: str, name: str) -> Iterator[ResponseEvent]:
        yield from self._close("completed")
        self._call, self._calls = _Call(place, call_id, name), self._calls + 1
        item = document.call_item(self._run_id, place, "in_progress", call_id, name, "")
        yield self._event("response.output_item.added", output_index=len(self._output), item=item)

    def _arguments(self, text: str) -> Iterator[ResponseEvent]:
        assert self._call is not None, "its name came first"
        self._call.arguments += text
        yield self._event("response.function_call_arguments.delta", **self._of_call(self._call), delta=text)

    def _close(self, status: str) -> Iterator[ResponseEvent]:
        """End the item that is being written, if there is one."""
        if self._thought is not None:
            thought, of_thought = self._thought, self._of_thought()
            self._thought = None
            yield self._event("response.reasoning_text.done", **of_thought, text=thought)
            yield from self._done(document.reasoning_item(self._run_id, status, thought))
        if self._text is not None:
            text, of_text = self._text, self._of_text()
            part = document.text_part(text.written, text.logprobs)
            yield self._event("response.output_text.done", **of_text, text=text.written, logprobs=part["logprobs"])
            yield self._event("response.content_part.done", **of_text, part=part)
            yield from self._done(document.message_item(self._run_id, status, [part]))
            self._text = None
        if self._call is not None:
            call, of_call = self._call, self._of_call(self._call)
            if status == "completed":
                yield self._event(
                    "response.function_call_arguments.done", **of_call, name=call.name, arguments=call.arguments
                )
            item = document.call_item(self._run_id, call.place, status, call.call_id, call.name, call.arguments)
            yield from self._done(item)
            self._call = None

    def _done(self, item: dict[str, Any]) -> Iterator[ResponseEvent]:
        yield self._event("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)

    def _of_thought(self) -> dict[str, Any]:
        return {
            "item_id": f"rs_{document.digits_of(self._run_id)}",
            "output_index": len(self._output),
            "content_index": 0,
        }

    def _of_text(self) -> dict[str, Any]:
        return {
            "item_id": f"msg_{document.digits_of(self._run_id)}",
            "output_index": len(self._output),
            "content_index": 0,
        }

    def _of_call(self, call: _Call) -> dict[str, Any]:
        return {"item_id": f"fc_{document.digits_of(self._run_id)}_{call.place}", "output_index": len(self._output)}

    def _outline(self, status: ResponseStatus) -> dict[str, Any]:
        return document.outline(self._request, self._run_id, self._created, status)

    def _whole(self, kind: str, response: dict[str, Any]) -> ResponseEvent:
        return self._event(kind, response=response)

    def _event(self, kind: str, **content: Any) -> ResponseEvent:
        made = {"type": kind, "sequence_number": self._number, **content}
        self._number += 1
        return made


class _Text:
    """The text that is being written."""

    def __init__(self) -> None:
        self.written = ""
        self.logprobs: list[Mapping[str, Any]] = []


class _Call:
    """The tool call that is being written."""

    def __init__(self, place: int, call_id: str, name: str) -> None:
        self.place, self.call_id, self.name = place, call_id, name
        self.arguments = ""

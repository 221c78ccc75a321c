"""
Calls of models in the form of Ollama's API: a plain answer, or a stream of JSON lines.

They are the calls of OpenAI's form (`ModelCall`): the same runs, the same road, the same entries.
The durations are those that this process saw: until an engine had begun, until its first text, until its end.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from app.api import problems
from app.api.openai.calls import Entries, ModelCall
from app.api.openai.errors import RequestFailed
from app.api.openai.road import Waiting
from app.inference.token_stream import EntryKind, StreamEntry
from app.kernel import clock
from app.kernel.errors import ArrieroError, Conflict

_MEDIA_TYPE = "application/x-ndjson"


@dataclass(slots=True)
class _Times:
    """When the steps of a call were seen, in seconds of a monotonic clock."""

    start: float = field(default_factory=time.monotonic)
    begun: float | None = None
    first: float | None = None

    def see(self, entry: StreamEntry) -> None:
        if entry.kind is EntryKind.BEGUN:
            self.begun, self.first = time.monotonic(), None
        elif entry.kind not in (EntryKind.DONE, EntryKind.FAILED) and self.first is None:
            self.first = time.monotonic()

    def shown(self, *, written: bool = True) -> dict[str, int]:
        """The durations in nanoseconds. Without text on the way the time of the prompt is not known on its own."""
        end = time.monotonic()
        found = {"total_duration": end - self.start}
        if self.begun is not None:
            found["load_duration"] = self.begun - self.start
            if not written:
                found["prompt_eval_duration"] = end - self.begun
            elif self.first is None:
                found["eval_duration"] = end - self.begun
            else:
                found["prompt_eval_duration"] = self.first - self.begun
                found["eval_duration"] = end - self.first
        return {name: max(round(seconds * 1e9), 1) for name, seconds in found.items()}


class OllamaCall:
    """One call, and the form of its answer: that of `chat` or of `generate`."""

    def __init__(self, call: ModelCall, name: str, kind: str, at_end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """`name` is the model as the client wrote it. `at_end` is awaited before a successful call ends."""
        self._call, self._name, self._kind, self._at_end = call, name, kind, at_end
        self._times = _Times()
        #: Characters that were sent.
        self._sent = self._thought = 0

    async def answer(self, request: Request) -> Response:
        """The whole answer. A client that goes away stops the call. Raises what `ModelCall.answer` raises."""

        async def found() -> dict[str, Any]:
            return self._last(await self.document(), whole=True)

        content = await until_left(request, found())
        return left() if content is None else problems.AsciiResponse(content, headers=dict(self._call.headers))

    async def stream(self) -> StreamingResponse:
        """A stream of JSON lines. Raises what `answer` raises, if that is known before the first token."""
        entries = self._call.entries()
        async with AsyncExitStack() as stack:
            stack.push_async_callback(entries.aclose)
            first = await anext(entries)
            while isinstance(first, StreamEntry) and first.kind is EntryKind.BEGUN:
                self._times.see(first)
                first = await anext(entries)
            if isinstance(first, StreamEntry) and first.kind is EntryKind.FAILED:
                raise _failed(first)
            stack.pop_all()
        headers = {**self._call.headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._lines(first, entries), media_type=_MEDIA_TYPE, headers=headers)

    async def document(self) -> Any:
        """The answer in OpenAI's form. Raises RequestFailed, and what the road raises."""
        async with aclosing(self._call.entries()) as entries:
            async for entry in entries:
                if isinstance(entry, Waiting):
                    continue
                self._times.see(entry)
                if entry.kind is EntryKind.FAILED:
                    raise _failed(entry)
                if entry.kind is EntryKind.DONE:
                    await self._at_end()
                    return entry.json()
        raise Conflict(f"run {self._call.run_id} has ended without an answer")

    def durations(self) -> dict[str, int]:
        """The durations of a call that writes no text."""
        return self._times.shown(written=False)

    async def _lines(self, first: StreamEntry | Waiting, entries: Entries) -> AsyncIterator[bytes]:
        async with aclosing(entries):
            try:
                entry: StreamEntry | Waiting | None = first
                while entry is not None:
                    if isinstance(entry, StreamEntry):
                        self._times.see(entry)
                        for line in await self.lines_of(entry):
                            yield _line(line)
                        if entry.kind in (EntryKind.DONE, EntryKind.FAILED):
                            return
                    entry = await anext(entries, None)
            except ArrieroError as error:
                yield _line({"error": str(error)})

    async def lines_of(self, entry: StreamEntry) -> list[dict[str, Any]]:
        """The lines of an entry."""
        match entry.kind:
            case EntryKind.TEXT:
                self._sent += len(entry.value)
                return [self._piece(entry.value)]
            case EntryKind.PIECES:
                return [line for piece in entry.json() if not piece["index"] for line in self._of_piece(piece)]
            case EntryKind.DONE:
                document = entry.json()
                await self._at_end()
                text, calls = _parts(document)
                thought = _thinking(document)[self._thought :]
                rest = [self._piece("", thinking=thought)] if thought else []
                rest += [self._piece(text[self._sent :])] if len(text) > self._sent else []
                called = [self._piece("", calls)] if calls else []
                return [*rest, *called, self._last(document, whole=False)]
            case EntryKind.FAILED:
                return [{"error": str(entry.json()["message"])}]
            case _:
                return []

    def _of_piece(self, piece: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the lines of a piece; tool calls come whole, at the end."""
        if thought := piece.get("reasoning"):
            self._thought += len(thought)
            yield self._piece("", thinking=thought)
        if piece["text"]:
            self._sent += len(piece["text"])
            yield self._piece(piece["text"])

    def _piece(self, text: str, calls: list[dict[str, Any]] | None = None, *, thinking: str = "") -> dict[str, Any]:
        return {**heading(self._name), **self._text(text, calls or [], thinking), "done": False}

    def _text(self, text: str, calls: list[dict[str, Any]], thinking: str) -> dict[str, Any]:
        thought = {"thinking": thinking} if thinking else {}
        if self._kind == "generate":
            return {"response": text, **thought}
        called = {"tool_calls": calls} if calls else {}
        return {"message": {"role": "assistant", "content": text, **thought, **called}}

    def _last(self, document: Any, *, whole: bool) -> dict[str, Any]:
        choice, usage = document["choices"][0], document["usage"]
        text, calls = _parts(document) if whole else ("", [])
        logprobs = (choice.get("logprobs") or {}).get("content")
        return {
            **heading(self._name),
            **self._text(text, calls, _thinking(document) if whole else ""),
            **({"logprobs": logprobs} if logprobs else {}),
            "done": True,
            "done_reason": "length" if choice["finish_reason"] == "length" else "stop",
            **self._times.shown(),
            "prompt_eval_count": usage["prompt_tokens"],
            "eval_count": usage["completion_tokens"],
        }


def heading(name: str) -> dict[str, Any]:
    """What each line begins with."""
    return {"model": name, "created_at": instant(clock.now())}


def instant(at: datetime) -> str:
    """An instant as Ollama writes it."""
    return at.isoformat().replace("+00:00", "Z")


async def until_left(request: Request, answering: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any] | None:
    """Await an answer; None, and it is cancelled, when the client goes away. Raises what it raises."""
    task, leaving = asyncio.create_task(answering), asyncio.create_task(_left(request))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, leaving):
            one.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


def left() -> Response:
    """The response to a client that has gone away."""
    return Response(status_code=499)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _parts(document: Any) -> tuple[str, list[dict[str, Any]]]:
    """The text of an answer, and its tool calls in Ollama's form."""
    choice = document["choices"][0]
    if "message" not in choice:
        return choice["text"], []
    calls = choice["message"].get("tool_calls") or ()
    functions = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]
    shown = [
        {"function": {"index": place, "name": name, "arguments": arguments}}
        for place, (name, arguments) in enumerate(functions)
    ]
    return choice["message"].get("content") or "", shown


def _thinking(document: Any) -> str:
    """The thinking of an answer."""
    return str(document["choices"][0].get("message", {}).get("reasoning_content") or "")


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


def _failed(entry: StreamEntry) -> RequestFailed:
    failed = entry.json()
    return RequestFailed(failed["reason"], failed["message"])

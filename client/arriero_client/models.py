"""Calls of models: chat, answers in the form of a schema, embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from arriero_client import exchange, streams
from arriero_client.effects import Clock, ConnectionLost, Emit, Operation, Read, Reply, Request, Together
from arriero_client.errors import ClientError, ConnectionFailed, InvalidAnswer, ServerFailed, TimedOut
from arriero_client.exchange import Retries
from arriero_client.operations import operation, stream
from arriero_client.results import (
    ChatPart,
    ChatResult,
    Compression,
    EmbeddedBatch,
    Embeddings,
    Model,
    Reasoned,
    ToolCall,
    Usage,
)
from arriero_client.streams import EventParser

M = TypeVar("M")

#: A conversation, or the one message of its user.
Messages = str | Sequence[Mapping[str, Any]]
#: Texts of one request, and requests at a time, of a batch of embeddings.
BATCH_SIZE, PARALLEL = 32, 4
#: Most texts of one request.
_MAX_TEXTS = 2_048
#: Most seconds that the server waits for a compression.
_MAX_WAIT = 600


class Models:
    """The operations on models. Further parameters of a call are those of OpenAI's API (docs/openai.md)."""

    retries: Retries
    #: Seconds for a model to begin to answer, and between two parts of an answer.
    model_timeout: float

    @operation
    def models(self) -> Operation[Sequence[Model]]:
        """Return the models that the server serves, each with its state."""
        found = yield from exchange.send_json(Request("GET", "/v1/models"), self.retries)
        return [Model.model_validate(one) for one in found["data"]]

    @operation
    def chat(self, /, model: str, messages: Messages, **parameters: Any) -> Operation[ChatResult]:
        """Return the model's answer to a conversation, or to one message."""
        return (yield from _chat(self, model, messages, parameters))

    @stream
    def chat_stream(self, /, model: str, messages: Messages, **parameters: Any) -> Operation[type[ChatPart]]:
        """
        Yield the model's answer piece by piece; the last part has the whole result.

        Closing the generator stops the model. A connection that is lost on the way raises ConnectionFailed: `tokens` of
        the run reads the rest.
        """
        began = yield Clock()
        body = {**_body(model, messages, parameters), "stream": True, "stream_options": {"include_usage": True}}
        reply = yield from streams.plain(_request(self, "/v1/chat/completions", body), self.retries)
        made, parser, first = _Answer(model, reply.headers.get("x-arriero-run")), EventParser(), None
        try:
            while (content := (yield Read())) is not None:
                for event in parser.feed(content):
                    if event.data == "[DONE]":
                        yield Emit(ChatPart("", made.result((yield Clock()) - began, first), made.run_id))
                        return ChatPart
                    text = made.add(event.json())
                    if text:
                        first = (yield Clock()) - began if first is None else first
                        yield Emit(ChatPart(text, run_id=made.run_id))
        except ConnectionLost as lost:
            raise ConnectionFailed(f"the answer broke off (run {made.run_id}): {lost}") from lost
        raise ConnectionFailed(f"the answer ended before it was complete (run {made.run_id})")

    @operation
    def reason(
        self, /, model: str, messages: Messages, schema: type[M] | Mapping[str, Any], **parameters: Any
    ) -> Operation[Reasoned[M]]:
        """
        Return an answer in the form of a schema: a type that pydantic knows, or a JSON Schema.

        The server forces the model into the form. Raises InvalidAnswer for an answer that was cut (`max_tokens`).
        """
        adapter: TypeAdapter[M] | None = None
        document = schema
        if not isinstance(schema, Mapping):
            adapter = TypeAdapter(schema)
            document = adapter.json_schema()
        form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": document}}
        answer = yield from _chat(self, model, messages, {**parameters, "response_format": form})
        try:
            value: Any = json.loads(answer.text) if adapter is None else adapter.validate_json(answer.text)
        except (ValueError, ValidationError) as error:
            cut = " (it was cut at max_tokens)" if answer.finish_reason == "length" else ""
            raise InvalidAnswer(f"the answer does not have the form of the schema{cut}: {error}", answer.text) from None
        return Reasoned(value, answer)

    @operation
    def compress_prompt(self, /, model: str, given: Messages, **parameters: Any) -> Operation[Compression]:
        """
        Return a text, or a conversation, with fewer tokens of a model, which is not loaded.

        The target is `max_tokens` or `target_ratio`; further parameters are those of `/v1/compress` (docs/memory.md).
        Raises TimedOut when it takes longer than `model_timeout`, at most 600 s; its run goes on.
        """
        began = yield Clock()
        wait = min(int(self.model_timeout), _MAX_WAIT)
        name = "text" if isinstance(given, str) else "messages"
        body = {"model": model, name: given if isinstance(given, str) else [dict(one) for one in given], **parameters}
        request = Request("POST", f"/v1/compress?wait={wait}", body=body, timeout=self.model_timeout + 10)
        reply = yield from exchange.send(request, self.retries)
        found, run_id = exchange.document(reply), reply.headers.get("x-arriero-run")
        if reply.status == 202:
            raise TimedOut(f"the compression (run {run_id}) has not ended within {wait} s")
        tokens = found["tokens"]
        return Compression(
            text=found.get("text"),
            messages=found.get("messages"),
            tokens_before=tokens["before"],
            tokens_after=tokens["after"],
            target_met=found["target_met"],
            reason=found.get("reason"),
            report=found,
            latency_s=(yield Clock()) - began,
            run_id=run_id,
        )

    @operation
    def embed(
        self,
        model: str,
        texts: str | Sequence[str],
        *,
        task: str | None = None,
        dimensions: int | None = None,
        long_text: str | None = None,
    ) -> Operation[Embeddings]:
        """
        Return the vectors of texts, in their order.

        `task` is `query` or `document`; `long_text` is `refuse`, `chunk` or `truncate`.
        """
        given = [texts] if isinstance(texts, str) else list(texts)
        return (yield from _embed(self, model, given, _options(task, dimensions, long_text)))

    @operation
    def embed_batch(
        self,
        model: str,
        texts: Sequence[str],
        *,
        batch_size: int = BATCH_SIZE,
        parallel: int = PARALLEL,
        task: str | None = None,
        dimensions: int | None = None,
        long_text: str | None = None,
    ) -> Operation[EmbeddedBatch]:
        """
        Return the vectors of any number of texts, in their order: `parallel` requests of `batch_size` texts at a time.

        What fails is in `failures` of the result, and stops nothing else. Of a request that is refused, each text is
        tried alone, so that one bad text costs no others.
        """
        if not 1 <= batch_size <= _MAX_TEXTS or not 1 <= parallel <= 64:
            raise ValueError(f"batch_size is 1 to {_MAX_TEXTS}, parallel is 1 to 64")
        began, options = (yield Clock()), _options(task, dimensions, long_text)
        groups = [range(at, min(at + batch_size, len(texts))) for at in range(0, len(texts), batch_size)]

        def of(group: Sequence[int]) -> Callable[[], Operation[Embeddings]]:
            return lambda: _embed(self, model, [texts[index] for index in group], options)

        def split(found: Any, group: Sequence[int]) -> bool:
            return isinstance(found, ClientError) and len(group) > 1 and _is_refusal(found)

        results = dict(zip(groups, (yield Together([of(group) for group in groups], parallel)), strict=True))
        again = [range(index, index + 1) for group, found in results.items() if split(found, group) for index in group]
        alone = (yield Together([of(group) for group in again], parallel)) if again else []
        results = {group: found for group, found in results.items() if not split(found, group)}
        results |= dict(zip(again, alone, strict=True))
        vectors: list[list[float] | None] = [None] * len(texts)
        failures: dict[int, ClientError] = {}
        for group, found in results.items():
            for place, index in enumerate(group):
                if isinstance(found, ClientError):
                    failures[index] = found
                else:
                    vectors[index] = found.vectors[place]
        tokens = sum(found.tokens_in for found in results.values() if isinstance(found, Embeddings))
        return EmbeddedBatch(vectors, dict(sorted(failures.items())), tokens, (yield Clock()) - began)


@dataclass(slots=True)
class _Answer:
    """An answer, as its chunks come."""

    model: str
    run_id: str | None
    text: str = ""
    finish_reason: str = ""
    usage: Usage = field(default_factory=Usage)
    tool_calls: list[ToolCall] = field(default_factory=list)

    def add(self, chunk: Any) -> str:
        """Add a chunk, and return its text. Raises ServerFailed for an error."""
        if "error" in chunk:
            raise ServerFailed(500, "error", str(chunk["error"].get("message", "")), code=chunk["error"].get("code"))
        if chunk.get("usage"):
            self.usage = _usage(chunk["usage"])
        text = ""
        for choice in chunk.get("choices", ()):
            if choice["index"]:
                continue
            delta = choice.get("delta", {})
            text += delta.get("content") or ""
            self.tool_calls += [_tool_call(one) for one in delta.get("tool_calls") or ()]
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        self.text += text
        return text

    def result(self, latency_s: float, first_text_s: float | None) -> ChatResult:
        """The whole answer."""
        calls = tuple(self.tool_calls)
        return ChatResult(
            self.text, self.model, self.finish_reason, self.usage, latency_s, first_text_s, calls, self.run_id
        )


def _chat(client: Models, model: str, messages: Messages, parameters: Mapping[str, Any]) -> Operation[ChatResult]:
    request = _request(client, "/v1/chat/completions", _body(model, messages, parameters))
    reply = yield from exchange.send(request, client.retries)
    document = exchange.document(reply)
    choice = document["choices"][0]
    message = choice["message"]
    return ChatResult(
        message.get("content") or "",
        document["model"],
        choice["finish_reason"],
        _usage(document["usage"]),
        reply.seconds,
        None,
        tuple(_tool_call(one) for one in message.get("tool_calls") or ()),
        _run_id(reply),
    )


def _embed(client: Models, model: str, texts: Sequence[str], options: Mapping[str, Any]) -> Operation[Embeddings]:
    body = {"model": model, "input": list(texts), **options}
    reply = yield from exchange.send(_request(client, "/v1/embeddings", body), client.retries)
    document = exchange.document(reply)
    vectors = [one["embedding"] for one in sorted(document["data"], key=lambda one: int(one["index"]))]
    return Embeddings(vectors, document["model"], document["usage"]["prompt_tokens"], reply.seconds, _run_id(reply))


def _request(client: Models, path: str, body: Mapping[str, Any]) -> Request:
    # Sent again, it may be computed twice; nothing else comes of that.
    return Request("POST", path, body=body, timeout=client.model_timeout)


def _body(model: str, messages: Messages, parameters: Mapping[str, Any]) -> dict[str, Any]:
    given = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(one) for one in messages]
    return {"model": model, "messages": given, **parameters}


def _options(task: str | None, dimensions: int | None, long_text: str | None) -> dict[str, Any]:
    given = {"task": task, "dimensions": dimensions, "long_text": long_text}
    return {name: value for name, value in given.items() if value is not None}


def _usage(document: Mapping[str, Any]) -> Usage:
    details = document.get("prompt_tokens_details") or {}
    return Usage(
        document.get("prompt_tokens", 0), document.get("completion_tokens", 0), details.get("cached_tokens", 0)
    )


def _tool_call(document: Mapping[str, Any]) -> ToolCall:
    function = document["function"]
    return ToolCall(document.get("id") or "", function["name"], json.loads(function.get("arguments") or "{}"))


def _run_id(reply: Reply) -> str | None:
    return reply.headers.get("x-arriero-run")


def _is_refusal(error: ClientError) -> bool:
    status = getattr(error, "status", None)
    return status in (400, 413, 422)

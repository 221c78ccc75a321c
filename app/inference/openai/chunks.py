"""The chunks of a streamed answer: pieces of text as they come, and at the end what only the whole answer tells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from app.inference.openai import answers


class Chunks:
    """Makes the chunks of one answer. Pieces of text are those of the first choice."""

    def __init__(
        self, kind: str, model: str, run_id: str, created: int, *, includes_usage: bool, echoed: str = ""
    ) -> None:
        self._chat = kind == "chat"
        self._heading = answers.heading(kind, model, run_id, created, whole=False)
        self._includes_usage = includes_usage
        self._echoed = echoed
        #: Characters of the first choice that were sent.
        self._sent = 0

    @property
    def model(self) -> str:
        """The model that the chunks name: the one that answers."""
        return str(self._heading["model"])

    @model.setter
    def model(self, name: str) -> None:
        self._heading["model"] = name

    def first(self) -> dict[str, Any]:
        """The first chunk, before any text."""
        if self._chat:
            return self._chunk([self._delta(0, {"role": "assistant", "content": ""})])
        self._sent = len(self._echoed)
        return self._chunk([self._delta(0, {"content": self._echoed})])

    def piece(self, text: str) -> dict[str, Any]:
        """A piece of the first text."""
        self._sent += len(text)
        return self._chunk([self._delta(0, {"content": text})])

    def last(self, document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks that end the stream: what was not sent of each choice, its finish reason, and the usage."""
        for choice in document["choices"]:
            message = choice["message"] if self._chat else {"content": choice["text"]}
            rest = (message.get("content") or "")[0 if choice["index"] else self._sent :]
            if rest:
                yield self._chunk([self._delta(choice["index"], {"content": rest})])
            for place, call in enumerate(message.get("tool_calls") or ()):
                yield self._chunk([self._delta(choice["index"], {"tool_calls": [{"index": place, **call}]})])
            ended = self._delta(choice["index"], {}, choice["finish_reason"])
            yield self._chunk([{**ended, "logprobs": choice["logprobs"]}])
        if self._includes_usage:
            yield {**self._heading, "choices": [], "usage": document["usage"]}

    def _delta(self, index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        content = {"delta": delta} if self._chat else {"text": delta.get("content", "")}
        return {"index": index, **content, "logprobs": None, "finish_reason": finish}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage: dict[str, Any] = {"usage": None} if self._includes_usage else {}
        return {**self._heading, "choices": choices, **usage}

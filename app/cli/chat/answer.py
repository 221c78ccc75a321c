"""The answer of a model, printed while it is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape

from app.cli import output
from app.cli.client import Client, RequestRefused, ServerEvent
from app.kernel.security.texts import printable


@dataclass(slots=True)
class Answer:
    """An answer, as far as it was written."""

    text: str = ""
    #: Characters of the thinking, which is not printed.
    thought: int = 0
    finish: str | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    #: The model that answered.
    model: str = ""
    #: Ctrl-C has stopped it.
    stopped: bool = False


def written(client: Client, model: str, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any]) -> Answer:
    """
    Ask a model, and print its answer to standard output as it comes. Ctrl-C stops the answer.

    Raises the errors of the API, and RequestRefused when the answer broke off.
    """
    answer = Answer()
    body = {"model": model, "messages": list(messages), **options}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    try:
        with client.stream("/v1/chat/completions", body) as events, _Status(output.live()) as status:
            for event in events:
                status.show(event.comment)
                for piece in _pieces(event, answer):
                    status.clear()
                    _print(piece)
                if answer.thought and not answer.text:
                    status.show("thinking …")
    except KeyboardInterrupt:
        answer.stopped = True
    if answer.text and not answer.text.endswith("\n") and sys.stdout.isatty():
        _print("\n")
    if answer.model not in ("", model):
        output.notes().print(f"[dim]answered by {answer.model}[/]")
    return answer


def _pieces(event: ServerEvent, answer: Answer) -> Iterator[str]:
    """The pieces of text of an event, which are noted in the answer."""
    if event.data in ("", "[DONE]"):
        return
    chunk = json.loads(event.data)
    if "error" in chunk:
        raise RequestRefused(str(chunk["error"]["message"]))
    answer.usage = chunk.get("usage") or answer.usage
    answer.model = chunk.get("model") or answer.model
    for choice in chunk["choices"]:
        answer.finish = choice["finish_reason"] or answer.finish
        answer.thought += len(choice["delta"].get("reasoning_content") or "")
        piece = choice["delta"].get("content") or ""
        answer.text += piece
        if piece:
            yield piece


def _print(text: str) -> None:
    """Print a piece: unchanged into a pipe, harmless at a terminal."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


class _Status:
    """A line at a terminal that says what the answer waits for, until its first token."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Any = None
        self._shown = False

    def __enter__(self) -> _Status:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def show(self, text: str) -> None:
        """Show what it waits for; once, where a line cannot be redrawn."""
        if not text:
            return
        if not self._console.is_terminal:
            if not self._shown:
                output.notes().print(f"[dim]{escape(text)}[/]")
            self._shown = True
            return
        if self._status is None:
            self._status = self._console.status("")
            self._status.start()
        self._status.update(f"[dim]{escape(text)}[/]")

    def clear(self) -> None:
        """Remove the line."""
        if self._status is not None:
            self._status.stop()
            self._status = None

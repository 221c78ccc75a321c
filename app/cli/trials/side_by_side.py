"""
`arriero shadow --interactive`: two models answer the same prompt side by side, and a person votes.

Which model is on which side is drawn for each prompt and shown after the vote. A vote is a score `vote` of both runs.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import typer
from rich.columns import Columns
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from app.cli.client import Client
from app.cli.output import console, notes
from app.kernel.errors import ArrieroError
from app.kernel.security.texts import printable

#: Pictures of the two texts in a second, and the seconds that a thread of an answer may take to stop.
_PER_SECOND, _STOP_SECONDS = 8, 5.0
#: What the keys of a vote give the left and the right side.
VOTES: Mapping[str, tuple[float, float]] = {"l": (1.0, 0.0), "r": (0.0, 1.0), "t": (0.5, 0.5)}
_KEYS = "l: left is better, r: right is better, t: a tie, s: skip, q: quit"


@dataclass(slots=True)
class SideAnswer:
    """What one model has written so far."""

    model: str
    text: str = ""
    run_id: str | None = None
    problem: str | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def panel(self, title: str) -> Panel:
        """The text in a frame."""
        shown = Text(printable(self.text, 100_000) or ("…" if not self.done.is_set() else ""))
        if self.problem is not None:
            shown.append(f"\n{self.problem}", style="red")
        return Panel(shown, title=title, expand=True)


def vote_on(
    client: Client,
    models: tuple[str, str],
    ask: Callable[[str], str],
    options: Mapping[str, Any],
    swaps: Callable[[], bool],
) -> Counter[str]:
    """
    Ask for prompts until there is none, and for a vote on each pair of answers. Returns the votes by model, and `tie`.

    `ask` returns a line of the person; it raises EOFError at the end of the input. `swaps` says whether the first model
    is on the right.
    """
    counted: Counter[str] = Counter()
    while True:
        try:
            prompt = ask("prompt").strip()
        except EOFError:
            return counted
        if not prompt:
            return counted
        sides = [SideAnswer(model) for model in models]
        if swaps():
            sides.reverse()
        _answer(client, sides, prompt, options)
        key = _key(ask)
        if key == "q":
            return counted
        if key in VOTES:
            for side, value in zip(sides, VOTES[key], strict=True):
                _store(client, side, value)
            counted[sides["lr".index(key)].model if key in "lr" else "tie"] += 1
        notes().print(f"left was {sides[0].model}, right was {sides[1].model}", highlight=False)


def _answer(client: Client, sides: list[SideAnswer], prompt: str, options: Mapping[str, Any]) -> None:
    """Have both models answer, and show what they write."""
    body = {"messages": [{"role": "user", "content": prompt}], "stream": True, **options}
    threads = [threading.Thread(target=_read, args=(client, side, body), daemon=True) for side in sides]
    for thread in threads:
        thread.start()
    with Live(console=console(), refresh_per_second=_PER_SECOND, transient=False) as live:
        while True:
            panels = [side.panel(title) for side, title in zip(sides, ("left", "right"), strict=True)]
            live.update(Columns(panels, equal=True, expand=True, width=max(20, console().width // 2 - 2)))
            if all(side.done.is_set() for side in sides):
                break
            next(side for side in sides if not side.done.is_set()).done.wait(1 / _PER_SECOND)
    for thread in threads:
        thread.join(_STOP_SECONDS)


def _read(client: Client, side: SideAnswer, body: Mapping[str, Any]) -> None:
    try:
        with client.stream("/v1/chat/completions", {**body, "model": side.model}) as events:
            for event in events:
                if event.data in ("", "[DONE]"):
                    continue
                chunk = json.loads(event.data)
                if "error" in chunk:
                    side.problem = str(chunk["error"].get("message", "it failed"))
                    continue
                side.run_id = side.run_id or _run_of(chunk.get("id"))
                for choice in chunk.get("choices", []):
                    side.text += choice.get("delta", {}).get("content") or ""
    except (ArrieroError, ValueError) as error:
        side.problem = str(error)
    finally:
        side.done.set()


def _run_of(id_: Any) -> str | None:
    """The run of an answer, by the id of its chunks."""
    try:
        return str(UUID(str(id_).rpartition("-")[2]))
    except ValueError:
        return None


def _store(client: Client, side: SideAnswer, value: float) -> None:
    if side.run_id is None:
        return
    try:
        client.put(f"/v1/runs/{side.run_id}/scores/vote", {"value": value})
    except ArrieroError as error:  # a cached answer has no run of its own
        notes().print(f"the vote on {side.model} is not stored: {error}", highlight=False)


def _key(ask: Callable[[str], str]) -> str:
    while True:
        try:
            key = ask(_KEYS).strip().lower()[:1]
        except EOFError:
            return "q"
        if key in (*VOTES, "s", "q"):
            return key
        typer.echo(_KEYS, err=True)

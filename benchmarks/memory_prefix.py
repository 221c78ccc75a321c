"""
How much of the prompts of a long conversation the engine has computed before.

`python -m benchmarks.memory_prefix --url http://127.0.0.1:8470 [--model NAME] [--turns N] [--json FILE]`

One conversation is continued turn by turn over `/v1/chat/completions` with `conversation_id`; its window fills, is
summarised in the background and moves several times. Each answer says how many tokens its prompt had, and how many of
them came from the kept prefix (`usage.prompt_tokens_details.cached_tokens`); its run says where the window began, which
summary it had, and what was recalled. The first turn has nothing before it and does not count.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from rich.table import Table

#: Seconds for one call.
PATIENCE = 300.0
_TOPICS = ("the garden", "a ship", "old maps", "bread", "the harbour", "bees", "a clock", "the winter", "paint", "a bridge")
_WORDS = (
    "today I saw it again and thought of you; the light was low, the street was quiet, and nobody asked for the price; "
    "later we walked along the river, counted the boats, and talked about what to cook on Sunday"
).split()


@dataclass(frozen=True, slots=True)
class PrefixFigures:
    """What one call says."""

    turn: int
    prompt: int
    cached: int
    first_seq: int
    #: Its window begins elsewhere than that of the call before.
    moved: bool
    #: The place up to which the summary in the prompt goes; 0 without one.
    summarised_upto: int
    recalled: int


def message(chance: random.Random, turn: int) -> str:
    """A message of the user: some forty tokens, and a reference that nobody else has."""
    words = " ".join(chance.choice(_WORDS) for _ in range(24))
    return f"About {chance.choice(_TOPICS)}, note REF-{turn:04d}-{chance.randrange(10_000, 99_999)}: {words}."


def converse(client: httpx2.Client, model: str, turns: int, tokens: int, seed: int) -> list[PrefixFigures]:
    """Continue a new conversation for so many turns."""
    chance = random.Random(seed)
    made = client.post("/v1/conversations", json={"metadata": {"benchmark": "memory_prefix"}})
    made.raise_for_status()
    found: list[PrefixFigures] = []
    for turn in range(turns):
        given = {
            "model": model,
            "conversation_id": made.json()["id"],
            "messages": [{"role": "user", "content": message(chance, turn)}],
            "max_tokens": tokens,
            "temperature": 0.8,
        }
        answer = client.post("/v1/chat/completions", json=given)
        answer.raise_for_status()
        usage = answer.json()["usage"]
        report = _assembly(client, answer.headers["X-Arriero-Run"])
        parts = report["parts"]
        used = parts.get("summary", {}).get("used", [])
        found.append(
            PrefixFigures(
                turn,
                usage["prompt_tokens"],
                usage["prompt_tokens_details"]["cached_tokens"],
                parts.get("recent", {}).get("first_seq", 0),
                parts.get("recent", {}).get("moved", False),
                used[0]["seq"] if used else 0,
                len(parts.get("recalled", {}).get("used", [])),
            )
        )
    return found


def _assembly(client: httpx2.Client, run: str) -> Any:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        answer = client.get(f"/v1/runs/{run}")
        if answer.status_code == 200 and answer.json()["state"] == "succeeded":
            return answer.json()["steps"][0]["attempts"][-1]["assembly"]
        time.sleep(0.05)
    raise TimeoutError(run)


def share(figures: list[PrefixFigures]) -> float:
    """The share of prompt tokens that came from the kept prefix."""
    return sum(one.cached for one in figures) / max(sum(one.prompt for one in figures), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8470")
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--turns", type=int, default=120)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with httpx2.Client(base_url=given.url, timeout=PATIENCE) as client:
        figures = converse(client, given.model, given.turns, given.tokens, given.seed)
    later = figures[1:]
    moves = [one for one in later if one.moved]
    begin = next((one.turn for one in later if one.summarised_upto), None)
    table = Table("", "prompts", "prompt tokens", "from the kept prefix", title=f"{given.model}, {given.turns} turns")
    rows = {
        "all after the first": later,
        "before the first summary was in the prompt": [one for one in later if begin is None or one.turn < begin],
        "from then on": [one for one in later if begin is not None and one.turn >= begin],
        "prompts whose window moved": moves,
        "all others": [one for one in later if not one.moved],
    }
    for name, of in rows.items():
        table.add_row(name, str(len(of)), str(sum(one.prompt for one in of)), f"{share(of):.1%}" if of else "-")
    Console().print(table)
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(one) for one in figures], indent=1))


if __name__ == "__main__":
    main()

"""
Whether a conversation of 2,000 turns still has its third turn in the prompt, on a model with a context of 2,048 tokens.

`python -m benchmarks.memory_long --url http://127.0.0.1:8470 [--redis URL] [--turns N] [--facts N] [--json FILE]`

Facts are told from the third turn on, a turn each; then follow turns about the same people and places. The turns are
appended over HTTP. With `--redis` everything in that Redis is removed in the middle: never give it one that others
use. Afterwards each fact is asked for, with an answer of one token that is not kept; the run says what the prompt had.
A fact counts as found when its message is one of the recalled or recent ones.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2
import redis

from benchmarks.memory_prefix import PATIENCE, assembly_of

_NAMES = [
    "Ada",
    "Bruno",
    "Chiara",
    "Dmitri",
    "Elif",
    "Farid",
    "Greta",
    "Hamid",
    "Ines",
    "Jonas",
    "Kaori",
    "Lars",
    "Mira",
    "Nadia",
    "Oskar",
    "Priya",
    "Quinn",
    "Rosa",
    "Sven",
    "Tove",
]
_PLACES = [
    "Porto",
    "Lima",
    "Turin",
    "Bergen",
    "Quito",
    "Dakar",
    "Hanoi",
    "Malmo",
    "Perth",
    "Davos",
    "Sofia",
    "Tunis",
    "Osaka",
    "Leeds",
    "Basel",
    "Cusco",
    "Split",
    "Tampa",
]
_THINGS = ["boat", "shed", "cellar", "studio", "chapel", "attic", "garage", "mill", "stable", "tower"]
#: Messages of one request.
_PART = 200


@dataclass(frozen=True, slots=True)
class Fact:
    """What is told once, and asked for later."""

    turn: int
    text: str
    question: str
    #: Nothing else has it.
    answer: str


@dataclass(frozen=True, slots=True)
class FoundFact:
    """Where the prompt of a question had the fact."""

    turn: int
    place: str
    prompt: int


def facts(chance: random.Random, count: int) -> list[Fact]:
    """Facts about pairs of a person and a thing, which are told from the third turn on."""
    pairs = [(name, thing) for name in _NAMES for thing in _THINGS]
    chance.shuffle(pairs)
    found = []
    for number, (name, thing) in enumerate(pairs[:count]):
        answer = f"{chance.randrange(1_000, 9_999)}-{number:03d}"
        text = f"By the way, {name} keeps the key of the {thing} in {chance.choice(_PLACES)} in box {answer}."
        found.append(Fact(3 + number, text, f"In which box does {name} keep the key of the {thing}?", answer))
    return found


def other(chance: random.Random) -> str:
    """A message about the same people, places and things."""
    name, place, thing = chance.choice(_NAMES), chance.choice(_PLACES), chance.choice(_THINGS)
    return chance.choice(
        (
            f"{name} was in {place} last week and bought {chance.randrange(2, 90)} apples.",
            f"The {thing} in {place} needs paint; {name} said so twice.",
            f"I lost a key yesterday, and {name} laughed.",
            f"{name} moved a box from the {thing} to {place}.",
            f"We had tea with {name} and talked about the weather in {place}.",
        )
    )


def append(client: httpx2.Client, conversation: str, texts: list[str]) -> None:
    """Append turns: what the user says, and a short answer."""
    messages: list[dict[str, str]] = []
    for text in texts:
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "I see."}]
    for start in range(0, len(messages), _PART):
        part = {"messages": messages[start : start + _PART]}
        client.post(f"/v1/conversations/{conversation}/messages", json=part).raise_for_status()


def look_for(client: httpx2.Client, model: str, conversation: str, fact: Fact) -> FoundFact:
    """Ask for a fact, and return where its prompt had it."""
    given = {
        "model": model,
        "conversation_id": conversation,
        "messages": [{"role": "user", "content": fact.question}],
        "max_tokens": 1,
        "memory": {"store": False},
    }
    answer = client.post("/v1/chat/completions", json=given)
    answer.raise_for_status()
    report = assembly_of(client, answer.headers["X-Arriero-Run"])
    parts: dict[str, Any] = report["parts"]
    seq = 2 * fact.turn - 1
    place = "nowhere"
    if any(one.get("seq") == seq for one in parts.get("recalled", {}).get("used", [])):
        place = "recalled"
    elif parts.get("recent", {}).get("first_seq", seq + 1) <= seq:
        place = "recent"
    return FoundFact(fact.turn, place, report["context"]["prompt"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8470")
    parser.add_argument("--redis", help="everything in it is removed in the middle")
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--turns", type=int, default=2_000)
    parser.add_argument("--facts", type=int, default=60)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    told = facts(chance, given.facts)
    texts = ["Hello.", "Let us talk.", *(fact.text for fact in told)]
    texts += [other(chance) for _ in range(given.turns - len(texts))]
    with httpx2.Client(base_url=given.url, timeout=PATIENCE) as client:
        made = client.post("/v1/conversations", json={})
        made.raise_for_status()
        conversation = made.json()["id"]
        append(client, conversation, texts[: given.turns // 2])
        if given.redis:
            redis.Redis.from_url(given.redis).flushall()
        append(client, conversation, texts[given.turns // 2 :])
        found = [look_for(client, given.model, conversation, fact) for fact in told]
    places = Counter(one.place for one in found)
    share = 1 - places["nowhere"] / len(found)
    print(f"{given.turns} turns, {len(found)} facts: in the prompt {share:.1%}; {dict(places)}")
    print(f"turn 3: {found[0].place}; prompts of at most {max(one.prompt for one in found)} tokens")
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(one) for one in found], indent=1))


if __name__ == "__main__":
    main()

"""
Memories: what small models extract from dialogues with known facts, and what the write gate makes of it.

    python -m benchmarks.memories                      # 64 dialogues; the gate on statements that are right and wrong
    python -m benchmarks.memories --models smollm2:135m,gemma3:270m

Dialogues are generated from a seed: one to three facts that the user says, small talk, questions, guesses of the
assistant, and in every third dialogue a memory that is known already: the assistant repeats it, or the user changes it.

A proposed memory is right if it has the words of a fact, no word of another one's value, and its negation.
Precision: right ones among those written (by the gate, or all of them without it). Recall: facts with a right memory
among those written. A known memory that the assistant repeated is no fact: to write it again is wrong.

The arm `statements` needs no model: each fact as a sentence, and sentences that are nearly it and wrong (another name,
number or place, with or without the negation, of what only the assistant said, of what is known).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from app.inference import prompts
from app.memory.memories import gate, prompt
from app.memory.memories.gate import GateMessage, KnownMemory, ProposedMemory
from app.workflows.language.steps import GenerateFields
from benchmarks.demo_quality import load

#: The prompt was written with dialogues of the first; figures are those of the second.
TUNED, REPORTED = 7, 20261122
_NAMES = ("Carla", "Miguel", "Yuki", "Priya", "Olaf", "Zanele", "Ingrid", "Mateo")
_CITIES = ("Porto", "Kyoto", "Pune", "Oslo", "Tallinn", "Quito", "Leeds", "Ghent")
_FIRMS = ("Globex", "Initech", "Umbrella", "Hooli", "Vandelay", "Stark")
_THINGS = ("oolong tea", "tofu", "chess", "jazz", "rye bread", "sailing", "pottery", "badminton")
_TOOLS = ("Postgres", "Rust", "Kafka", "Terraform", "Redis", "Django")
_MONTHS = ("January", "March", "May", "July", "October", "December")
#: What the user says, the memory of it, and its kind; `{x}` are values.
_FACTS = (
    ("My {relative} {name} moved to {city} in {month}.", "The user's {relative} {name} moved to {city} in {month}.", "fact"),
    ("I started at {firm} in {month} as an analyst.", "The user started at {firm} in {month} as an analyst.", "fact"),
    ("I never buy {thing}, by the way.", "The user never buys {thing}.", "preference"),
    ("I really prefer {thing} on weekends.", "The user prefers {thing} on weekends.", "preference"),
    ("We decided to use {tool} for the billing service.", "They decided to use {tool} for the billing service.", "decision"),
    ("Every {month} I visit my {relative} in {city}.", "Every {month} the user visits their {relative} in {city}.", "pattern"),
    ("My invoice number is {number}.", "The user's invoice number is {number}.", "fact"),
    (
        "It finally worked: caching with {tool} cut the load by {percent} percent.",
        "Caching with {tool} cut the load by {percent} percent.",
        "breakthrough",
    ),
)  # fmt: skip
_TALK = (
    ("Good morning! How are you?", "I am fine, thank you. What can I do for you?"),
    ("Can you explain what a mutex is?", "A mutex lets one thread at a time enter a section."),
    ("What is the weather like?", "I cannot see the weather from here."),
    ("Thanks, that helps.", "You are welcome!"),
    ("Could you write that more briefly?", "Of course: one thread at a time."),
    ("Is there a good book on it?", "There are several. Do you like to read in the evening?"),
)
_GUESSES = ("You probably live near the sea, then.", "I suppose you own a bicycle.", "Perhaps you have two dogs.")
#: Memories that are known, and what the user says when they change.
_KNOWN = (
    ("The user lives in {city}.", "I moved, I live in {other} now.", "The user lives in {other}."),
    ("The user works at {firm}.", "I left {firm}, I work at {other_firm} now.", "The user works at {other_firm}."),
)
_WORD = re.compile(r"[\w.]+")
_PLAIN = frozenset(
    [
        "the",
        "a",
        "an",
        "user",
        "user's",
        "their",
        "they",
        "in",
        "at",
        "to",
        "for",
        "with",
        "my",
        "as",
        "of",
        "is",
        "s",
        "has",
        "i",
        "it",
        "we",
        "on",
        "by",
        "now",
        "every",
        "service",
    ]
)
_NOT = re.compile(r"\b(?:never|not|no|n't|don't|does not|stopped)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class KnownFact:
    """A fact that a dialogue states."""

    text: str
    kind: str
    #: Words that a memory of it has; a proposal with those of another fact is wrong.
    keys: frozenset[str]
    negative: bool
    #: The number of the known memory that it changes.
    replaces: int | None = None


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Messages with the facts in them."""

    messages: list[GateMessage]
    facts: list[KnownFact]
    known: list[KnownMemory]
    #: Statements that are wrong, by what is wrong with them.
    wrong: list[tuple[str, str]] = field(default_factory=list)


def keys_of(text: str) -> frozenset[str]:
    """Words that say something, cut to five characters."""
    words = (word.strip(".").lower() for word in _WORD.findall(text))
    return frozenset(word[:5] for word in words if word and word not in _PLAIN and not _NOT.fullmatch(word))


def dialogues(seed: int, count: int) -> list[Dialogue]:
    """Generate dialogues."""
    chance = random.Random(seed)
    return [_dialogue(chance, number) for number in range(count)]


def _values(chance: random.Random) -> dict[str, str]:
    city, other = chance.sample(_CITIES, 2)
    firm, other_firm = chance.sample(_FIRMS, 2)
    name, other_name = chance.sample(_NAMES, 2)
    return {
        "name": name, "other_name": other_name, "city": city, "other": other, "firm": firm, "other_firm": other_firm,
        "thing": chance.choice(_THINGS), "tool": chance.choice(_TOOLS), "month": chance.choice(_MONTHS),
        "relative": chance.choice(("sister", "brother", "daughter", "cousin")),
        "number": str(chance.randrange(10_000, 99_999)), "percent": str(chance.randrange(11, 89)),
    }  # fmt: skip


def _dialogue(chance: random.Random, number: int) -> Dialogue:
    said: list[tuple[str, str]] = [chance.choice(_TALK) for _ in range(chance.randrange(1, 3))]
    facts: list[KnownFact] = []
    known: list[KnownMemory] = []
    wrong: list[tuple[str, str]] = []
    for statement, memory, kind in chance.sample(_FACTS, chance.randrange(1, 4)):
        values = _values(chance)
        text = memory.format(**values)
        facts.append(KnownFact(text, kind, keys_of(text), bool(_NOT.search(text))))
        said.append((statement.format(**values), chance.choice(("I see.", "Noted.", "Good to know."))))
        wrong += list(_corrupted(text, values))
    guess = chance.choice(_GUESSES)
    said.append((chance.choice(_TALK)[0], guess))
    wrong.append(("only the assistant", guess.replace("You probably", "The user").replace("I suppose you", "The user")))
    if number % 3 == 0:
        values = _values(chance)
        before, change, after = (one.format(**values) for one in _KNOWN[number // 3 % 2])
        known.append(KnownMemory(0, before))
        if number % 2:
            facts.append(KnownFact(after, "fact", keys_of(after), negative=False, replaces=0))
            said.append((change, "Thank you for telling me."))
        else:
            said.append(("What do you know about me?", before.replace("The user", "You").replace("s ", " ", 1)))
            wrong.append(("a known memory", before))
    order = said[:1] + chance.sample(said[1:], len(said) - 1)
    messages = [
        GateMessage(place, role, content)
        for place, (role, content) in enumerate(
            (pair for user, assistant in order for pair in (("user", user), ("assistant", assistant))), start=1
        )
    ]
    return Dialogue(messages, facts, known, wrong)


def _corrupted(text: str, values: dict[str, str]) -> Iterator[tuple[str, str]]:
    for name, other in (("name", "other_name"), ("city", "other"), ("firm", "other_firm")):
        if values[name] in text:
            yield "another name", text.replace(values[name], values[other])
    for name in ("number", "percent"):
        if values[name] in text:
            yield "another number", text.replace(values[name], str(int(values[name]) + 1))
    if " never " in text:
        yield "without the negation", text.replace(" never ", " ")
    elif " prefers " in text:
        yield "with a negation", text.replace(" prefers ", " does not prefer ")
    yield "an invention", f"{text.rstrip('.')} and plays the violin in a famous orchestra."


@dataclass(slots=True)
class MemoryFigures:
    """Proposals counted."""

    facts: int = 0
    proposed: int = 0
    right: int = 0
    found: int = 0
    #: Those that name the known memory that they replace, of facts that do.
    replaced: int = 0
    to_replace: int = 0

    def add(self, dialogue: Dialogue, written: Sequence[tuple[ProposedMemory, int | None]]) -> None:
        """Count the memories that are written for a dialogue."""
        self.facts += len(dialogue.facts)
        self.proposed += len(written)
        found: set[int] = set()
        for proposal, replaces in written:
            at = is_right(dialogue, proposal.text)
            if at is not None:
                self.right += 1
                found.add(at)
                self.replaced += dialogue.facts[at].replaces is not None and replaces == 0
        self.found += len(found)
        self.to_replace += sum(fact.replaces is not None for fact in dialogue.facts)

    def shown(self) -> dict[str, float]:
        return {
            **asdict(self),
            "precision": self.right / max(1, self.proposed),
            "recall": self.found / max(1, self.facts),
        }


def is_right(dialogue: Dialogue, text: str) -> int | None:
    """The fact that a statement says; None for one that is wrong, or of none."""
    keys = keys_of(text)
    for at, fact in enumerate(dialogue.facts):
        others = frozenset().union(*(one.keys for one in dialogue.facts if one is not fact)) - fact.keys
        if fact.keys <= keys and not keys & others and bool(_NOT.search(text)) == fact.negative:
            more = keys - fact.keys
            said = keys_of(" ".join(message.content for message in dialogue.messages if message.role == "user"))
            return at if more <= said else None
    return None


def statements(made: Sequence[Dialogue]) -> dict[str, object]:
    """The gate on statements that are right and that are wrong."""
    passed, total = 0, 0
    let_in, wrong = Counter[str](), Counter[str]()
    reasons = Counter[str]()
    for dialogue in made:
        for fact in dialogue.facts:
            (found,) = gate.decide(
                [ProposedMemory(fact.text, replaces=fact.replaces)], dialogue.messages, dialogue.known
            )
            total += 1
            passed += found.reason is None
            if found.reason is not None:
                reasons[f"{found.reason}: {fact.text} | {found.detail}"] += 1
        for what, text in dialogue.wrong:
            (found,) = gate.decide([ProposedMemory(text)], dialogue.messages, dialogue.known)
            wrong[what] += 1
            let_in[what] += found.reason is None
    for reason, count in reasons.most_common(5):
        print(f"  refused although right: {count} x {reason}")
    figures = {"right": total, "right_passed": passed, "wrong": dict(wrong), "wrong_passed": dict(let_in)}
    print(f"statements  right {passed} of {total} pass; wrong that pass: {dict(let_in)} of {dict(wrong)}", flush=True)
    return figures


def extract(model: str, made: Sequence[Dialogue], threads: int) -> dict[str, object]:
    """Let a model propose memories, with the workflow, prompt and grammar of the job."""
    arms = {"all": MemoryFigures(), "gate": MemoryFigures()}
    reasons: Counter[str] = Counter()
    tokens_in = tokens_out = invalid = 0
    examples: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        engine = load(model, Path(folder), threads)
        try:
            step = prompt.definition_of(model, is_chat=model != "gemma3:270m").step(prompt.STEP)
            assert isinstance(step, GenerateFields)
            began = time.perf_counter()
            tickets = []
            for dialogue in made:
                text = prompt.prompt_of(dialogue.messages, dialogue.known)
                data = {"inputs": {"prompt": text}, "steps": {}, "run": {}}
                tickets.append(engine.generate(prompts.request_of(step, data, priority="batch", attempt=1)))
            for dialogue, ticket in zip(made, tickets, strict=True):
                answer = ticket.result(timeout=3_600)
                tokens_in += answer.tokens_in
                tokens_out += answer.tokens_out
                try:
                    proposals = prompt.proposals(json.loads(answer.text))
                except ValueError:
                    invalid += 1  # it was cut at max_tokens
                    proposals = []
                decisions = gate.decide(proposals, dialogue.messages, dialogue.known)
                arms["all"].add(dialogue, [(one, one.replaces) for one in proposals])
                written = [(one.proposed, one.replaces) for one in decisions if one.reason is None]
                arms["gate"].add(dialogue, written)
                reasons.update(one.reason.value for one in decisions if one.reason is not None)
                examples.append(
                    {
                        "facts": [fact.text for fact in dialogue.facts],
                        "proposed": [(one.proposed.text, one.reason and one.reason.value) for one in decisions],
                    }
                )
            seconds = time.perf_counter() - began
        finally:
            engine.close()
    found = {name: figures.shown() for name, figures in arms.items()}
    for name, figures in found.items():
        print(
            f"{model:14} {name:5} precision {figures['precision']:.3f} ({figures['right']} of {figures['proposed']})  "
            f"recall {figures['recall']:.3f} ({figures['found']} of {figures['facts']})  replaced "
            f"{figures['replaced']} of {figures['to_replace']}",
            flush=True,
        )
    print(
        f"{model:14} refused {dict(reasons)}; {invalid} answers cut; tokens per dialogue "
        f"{tokens_in / len(made):.0f} in, {tokens_out / len(made):.0f} out; {seconds:.0f} s",
        flush=True,
    )
    return {
        "model": model, "arms": found, "refused": dict(reasons), "cut": invalid, "tokens_in": tokens_in,
        "tokens_out": tokens_out, "seconds": seconds, "examples": examples,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=REPORTED)
    parser.add_argument("--dialogues", type=int, default=64)
    parser.add_argument("--models", default="smollm2:135m,gemma3:270m", help="names of the catalogue, or nothing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/memories.json"))
    given = parser.parse_args()
    made = dialogues(given.seed, given.dialogues)
    result: dict[str, object] = {"seed": given.seed, "dialogues": len(made), "statements": statements(made)}
    models = [name for name in given.models.split(",") if name]
    result["models"] = [extract(name, made, given.threads) for name in models]
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

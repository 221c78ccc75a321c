"""
Consolidation: which patterns small models find in turns whose patterns are known, and what they cost.

    python -m benchmarks.consolidation                       # 4 users, 560 turns
    python -m benchmarks.consolidation --models smollm2:135m --tune

Turns are generated from a seed. Each user has six patterns of twelve, with ten to sixteen turns each that say the same
in different words and with different details, and as many other turns that have nothing in common. Vectors are those of
all-minilm on llama.cpp, clusters those of the product, and so are the prompts, both passes, and the judgement.

A pattern is right if most of its turns belong to a known pattern and its statement has the words of that one.
Precision: right ones among those written. Recall: known patterns of users with a right one. `one pass` writes what the
first pass states and its turns have; `two passes` is the product. A cluster is pure if nine of ten of its turns
belong to one pattern.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from app.inference import prompts
from app.inference.requests import EmbedRequest
from app.kernel.sections.consolidation import ConsolidationSettings
from app.memory.consolidation import patterns, prompt
from app.memory.consolidation.patterns import PatternReason
from app.workflows.language.steps import MapStep
from benchmarks.demo_quality import load
from workers.engine.engine import LlamaEngine
from workers.memory.consolidation import clusterer

#: Prompts and limits were chosen with the turns of the first; figures are those of the second.
TUNED, REPORTED = 7, 20261123
SETTINGS = ConsolidationSettings()

_WHEN = ("on Monday", "yesterday", "this morning", "last night", "again", "today", "since Tuesday", "twice this week")
#: Patterns: the words that their statement needs (one of each group, by their beginnings), and how turns say them.
_PATTERNS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("backup", "fail|broke|stop"),
        (
            "The nightly backup failed {when}.",
            "backup failed {when}, can you look at the log?",
            "Our backup job broke {when}, it failed with error {number}.",
            "Why does the backup fail {when}?",
            "The backup of server {number} failed {when}",
        ),
    ),
    (
        ("translat", "french"),
        (
            "Please translate this {thing} into French.",
            "Can you translate the {thing} to French {when}?",
            "I need a French translation of a {thing}.",
            "translate into French: the {thing}",
            "Another {thing} that has to be translated to French",
        ),
    ),
    (
        ("back", "pain|hurt|ache"),
        (
            "My back hurts {when} after sitting.",
            "I have back pain {when}.",
            "back pain {when}, I sat at the desk for {number} hours",
            "My lower back aches {when}, any exercises?",
            "What helps against back pain from sitting?",
        ),
    ),
    (
        ("invoice|bill", "late|pay|paid|due"),
        (
            "Customer {number} has not paid the invoice {when}.",
            "The invoice {number} is late, nobody has paid it.",
            "Write a reminder: invoice {number} is not paid.",
            "Another unpaid invoice {when}, number {number}.",
            "Who pays invoice {number}? It was due {when}.",
        ),
    ),
    (
        ("train", "late|delay"),
        (
            "My train was late {when}.",
            "The train to work is delayed {when} by {number} minutes.",
            "train late {when}, I miss the meeting",
            "Is there a refund when the train is {number} minutes late?",
            "I was late {when} because the train was delayed",
        ),
    ),
    (
        ("vegetarian|vegan|meat", "recipe|dinner|cook|dish|food|meal"),
        (
            "Find a vegetarian recipe for dinner {when}.",
            "A vegetarian dinner for {number} people, please.",
            "What vegetarian dish can I cook {when}?",
            "I need a vegetarian recipe with lentils.",
            "vegetarian dinner ideas {when}?",
        ),
    ),
    (
        ("python|script", "test|unit"),
        (
            "Write unit tests for this Python function.",
            "Can you add Python unit tests to module {number}?",
            "The Python unit tests of module {number} need more cases.",
            "unit tests for the Python script {when}, please",
            "How do I write a Python unit test with {number} fixtures?",
        ),
    ),
    (
        ("sleep|insomnia|awake", ""),
        (
            "I could not sleep {when}.",
            "I slept only {number} hours {when}, I cannot sleep.",
            "What helps me sleep? I was awake {when}.",
            "I cannot sleep {when}, my head is full.",
            "Bad sleep {when}, awake at {number}.",
        ),
    ),
    (
        ("coffee", "order|bean|buy"),
        (
            "Order coffee beans for the office {when}.",
            "We are out of coffee beans {when}, please order {number} kilos.",
            "Please buy coffee beans for the kitchen.",
            "The coffee beans are empty {when}, order more.",
            "order {number} bags of coffee beans",
        ),
    ),
    (
        ("meeting|call", "move|moved|reschedul|postpone|later"),
        (
            "Please move my meeting with the team to the afternoon.",
            "Can you move the meeting {when} to {number} o'clock?",
            "move my {number} o'clock meeting to the afternoon",
            "The meeting {when} must be moved to the afternoon.",
            "I have to move the team meeting, the afternoon is better.",
        ),
    ),
    (
        ("spanish", "practi|learn|vocab|word|conversation|speak"),
        (
            "Let's practise Spanish vocabulary {when}.",
            "Teach me {number} Spanish words to learn.",
            "I want to practise Spanish {when}, ask me words.",
            "How do I learn Spanish verbs?",
            "Practise a Spanish conversation with me.",
        ),
    ),
    (
        ("tomato|plant|garden", "leaf|leaves|yellow|water|grow|plant"),
        (
            "The leaves of my tomato plants are yellow {when}.",
            "Why do my tomato plants get yellow leaves?",
            "yellow leaves on the tomatoes {when}, do they need water?",
            "My tomatoes have {number} yellow leaves {when}.",
            "What do I do about yellow leaves of tomato plants?",
        ),
    ),
)
_THINGS = ("letter", "contract", "menu", "web page", "leaflet", "poem", "manual", "offer", "recipe", "speech")
#: Turns that have nothing in common: two of these lists, and a number, make one.
_NOISE_VERBS = (
    "Explain", "Who invented", "What does it cost to repair", "Tell me a joke about", "How old is", "Draw",
    "Where do I find", "I dreamt of", "Is it legal to sell", "Compare prices of", "My neighbour talked about",
    "What is the opposite of", "Write a haiku about", "Which museum has", "How heavy is", "What rhymes with",
    "I lost", "Can a child understand", "Summarise the history of", "What colour has",
)  # fmt: skip
_NOISE_NOUNS = (
    "black holes", "the accordion", "a zebra", "the Hanseatic League", "a bicycle chain", "photosynthesis", "origami",
    "a lighthouse", "the stock exchange", "volcanoes", "a violin bow", "the Roman aqueducts", "penguins", "a sundial",
    "the Rubik's cube", "glaciers", "a typewriter", "chess openings", "the moon landing", "sourdough", "a kayak",
    "quantum bits", "the Silk Road", "hedgehogs", "an umbrella", "opera", "the periodic table", "a hammock",
    "submarines", "the Great Wall", "amber", "a trombone", "solar eclipses", "cheese mites", "a compass", "mosaics",
    "the Sahara", "a carousel", "Braille", "lightning", "marzipan", "the tango", "fossils", "a telescope",
    "dragonflies", "the metric system", "a ferry", "jigsaw puzzles", "tulips", "the Vikings",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SeededTurn:
    """A turn of a user, and the number of its pattern; None without one."""

    user: str
    text: str
    pattern: int | None


@dataclass(frozen=True, slots=True)
class FoundCluster:
    """A cluster of the turns of a user, and the answers about it."""

    user: str
    turns: tuple[SeededTurn, ...]


def turns_of(seed: int, users: int) -> list[SeededTurn]:
    """Return the turns of users, in an order of chance."""
    chance = random.Random(seed)
    found: list[SeededTurn] = []
    for number in range(users):
        user = f"user{number}"
        own: list[SeededTurn] = []
        for pattern in chance.sample(range(len(_PATTERNS)), 6):
            for _ in range(chance.randint(10, 16)):
                values = {
                    "when": chance.choice(_WHEN),
                    "number": chance.randint(2, 99),
                    "thing": chance.choice(_THINGS),
                }
                own.append(SeededTurn(user, chance.choice(_PATTERNS[pattern][1]).format(**values), pattern))
        nouns = chance.sample(_NOISE_NOUNS * 2, len(own))
        own += [SeededTurn(user, f"{chance.choice(_NOISE_VERBS)} {noun}?", None) for noun in nouns]
        chance.shuffle(own)
        found += own
    return found


def is_right(cluster: FoundCluster, text: str) -> int | None:
    """Return the known pattern of a cluster if a statement says it."""
    pattern, times = Counter(turn.pattern for turn in cluster.turns).most_common(1)[0]
    if pattern is None or times <= len(cluster.turns) / 2:
        return None
    groups = _PATTERNS[pattern][0]
    said = all(re.search(rf"\b(?:{group})", text, re.IGNORECASE) for group in groups)
    return pattern if said else None


def clusters_of(turns: Sequence[SeededTurn], vectors: Sequence[Sequence[float]]) -> list[FoundCluster]:
    """Return the clusters of each user, by the program of the product."""
    of: dict[str, list[int]] = defaultdict(list)
    for index, turn in enumerate(turns):
        of[turn.user].append(index)
    groups = [[json.dumps([round(x, 5) for x in vectors[index]]) for index in group] for group in of.values()]
    answer = clusterer.cluster(groups, SETTINGS.min_turns, timedelta(minutes=5))
    return [
        FoundCluster(user, tuple(turns[group[index]] for index in indexes))
        for (user, group), clusters in zip(of.items(), answer, strict=True)
        for indexes in clusters
    ]


def vectors_of(engine: LlamaEngine, texts: Sequence[str]) -> list[tuple[float, ...]]:
    """Return the vectors of texts."""
    found: list[tuple[float, ...]] = []
    for first in range(0, len(texts), 64):
        found += engine.embed(EmbedRequest(tuple(texts[first : first + 64])), 600.0).vectors
    return found


def asked(model: str, clusters: Sequence[FoundCluster], threads: int) -> tuple[list[list[Any]], dict[str, int]]:
    """Return the answers of both passes, and the tokens."""
    steps = prompt.definition_of(model, model, "all-minilm:l6-v2", 4).steps
    inputs = prompt.inputs_of([[turn.text for turn in cluster.turns] for cluster in clusters])
    tokens = Counter[str]()
    answers: list[list[Any]] = []
    with tempfile.TemporaryDirectory(prefix="arriero-consolidation-") as folder:
        engine = load(model, Path(folder), threads)
        try:
            for step in steps[:2]:
                assert isinstance(step, MapStep)
                datas = [{"inputs": inputs, "item": item} for item in inputs[step.id]]
                tickets = [
                    engine.generate(prompts.request_of(step.step, data, priority="batch", attempt=1))  # type: ignore[arg-type] # the step is a generate step
                    for data in datas
                ]
                found: list[Any] = []
                for ticket in tickets:
                    answer = ticket.result(timeout=3_600)
                    tokens.update(
                        {
                            "in": answer.tokens_in,
                            "reused": answer.tokens_cached,
                            "out": answer.tokens_out,
                            "requests": 1,
                        }
                    )
                    try:
                        found.append(json.loads(answer.text))
                    except ValueError:
                        found.append(None)  # it was cut at max_tokens
                answers.append(found)
        finally:
            engine.close()
    return answers, dict(tokens)


def figures(written: Sequence[tuple[FoundCluster, str]], known: int) -> dict[str, Any]:
    """Return precision and recall of what was written."""
    rights = [(cluster.user, is_right(cluster, text)) for cluster, text in written]
    right = [one for one in rights if one[1] is not None]
    return {
        "written": len(written),
        "right": len(right),
        "precision": round(len(right) / max(len(written), 1), 3),
        "found": len(set(right)),
        "known": known,
        "recall": round(len(set(right)) / known, 3),
    }


def measure(model: str, clusters: Sequence[FoundCluster], known: int, embedder: LlamaEngine, threads: int) -> Any:
    """Measure a model; prints and returns its figures."""
    began = time.perf_counter()
    (first, second), tokens = asked(model, clusters, threads)
    said = [patterns.statement_of(one) or prompt.NOTHING for one in [*first, *second]]
    vectors = vectors_of(embedder, said)
    texts = [[turn.text for turn in cluster.turns] for cluster in clusters]
    judged = [
        patterns.judge(first[at], second[at], patterns.cosine(vectors[at], vectors[len(clusters) + at]), texts[at], 0.0)
        for at in range(len(clusters))
    ]
    one_pass = [(clusters[at], one.text) for at, one in enumerate(judged) if one.reason is None]
    arms = {"one pass": figures(one_pass, known)}
    for least in (0.4, 0.5, 0.6, 0.7):
        kept = [
            (clusters[at], one.text) for at, one in enumerate(judged) if one.reason is None and one.confidence >= least
        ]
        arms[f"two passes, {least}"] = figures(kept, known)
    reasons = Counter(str(one.reason or PatternReason.LOW_CONFIDENCE) for one in judged if one.reason is not None)
    for name, found in arms.items():
        print(
            f"{model:14} {name:16} precision {found['precision']:.3f} ({found['right']} of {found['written']})  "
            f"recall {found['recall']:.3f} ({found['found']} of {known})",
            flush=True,
        )
    print(f"{model:14} refused {dict(reasons)}; tokens {tokens}; {time.perf_counter() - began:.0f} s", flush=True)
    examples = [
        {
            "turns": [turn.text for turn in cluster.turns[:4]],
            "first": said[at],
            "second": said[len(clusters) + at],
            "confidence": judged[at].confidence,
            "agreement": judged[at].agreement,
            "grounded": judged[at].grounded,
            "reason": judged[at].reason,
            "right": is_right(cluster, judged[at].text) is not None,
        }
        for at, cluster in enumerate(clusters)
    ]
    return {"model": model, "arms": arms, "refused": dict(reasons), "tokens": tokens, "examples": examples}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="the seed on which prompts and limits were chosen")
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--models", default="smollm2:135m,gemma3:270m", help="names of the catalogue, or nothing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/consolidation.json"))
    given = parser.parse_args()
    turns = turns_of(TUNED if given.tune else REPORTED, given.users)
    known = len({(turn.user, turn.pattern) for turn in turns if turn.pattern is not None})
    with tempfile.TemporaryDirectory(prefix="arriero-consolidation-") as folder:
        embedder = load("all-minilm:l6-v2", Path(folder), given.threads)
        try:
            clusters = clusters_of(turns, vectors_of(embedder, [turn.text for turn in turns]))
            pure = [
                one for one in clusters if max(Counter(t.pattern for t in one.turns).values()) >= 0.9 * len(one.turns)
            ]
            of_patterns = {(one.user, Counter(t.pattern for t in one.turns).most_common(1)[0][0]) for one in clusters}
            covered = len({one for one in of_patterns if one[1] is not None})
            of_noise = sum(Counter(t.pattern for t in one.turns).most_common(1)[0][0] is None for one in clusters)
            print(
                f"{len(turns)} turns, {known} patterns; {len(clusters)} clusters, {len(pure)} pure, {of_noise} of "
                f"turns without a pattern; {covered} patterns have a cluster",
                flush=True,
            )
            models = [
                measure(name, clusters, known, embedder, given.threads) for name in given.models.split(",") if name
            ]
        finally:
            embedder.close()
    result = {"turns": len(turns), "known": known, "clusters": len(clusters), "pure": len(pure), "models": models}
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

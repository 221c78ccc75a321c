"""
Compression: which answers are left, in real tokens.

    python -m benchmarks.compression                 # 50 conversations, 2,000 questions: the reported seed
    python -m benchmarks.compression --questions 200 # a sample, for a first look
    python -m benchmarks.compression --answers 60    # also: a model answers from full and from compressed contexts

Kept: the share of the words of an answer that are still in the utterances that are its evidence, over all questions
with an answer. Whole: the share of questions of which every such word, and every utterance of the evidence, is left.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from app.catalog import files
from app.kernel.settings import load
from app.memory.compression.compressor import Target, compress
from app.memory.compression.conversation import Turn
from app.memory.compression.stop_words import STOP_WORDS
from app.memory.compression.texts import words
from benchmarks.conversations import GeneratedConversation, Question, generate, questions
from workers.engine.bindings.vocabulary import Vocabulary

#: Parameters were chosen on the first; figures are those of the second.
TUNED, REPORTED = 7, 20261122

Count = Callable[[Sequence[str]], list[int]]
#: From a conversation and a question to what is left of each utterance.
Arm = Callable[[GeneratedConversation, Question, float], Sequence[str]]


def turns_of(made: GeneratedConversation) -> list[Turn]:
    return [Turn(one.text, "user", one.speaker, one.at) for one in made.utterances]


def arms(count: Count) -> dict[str, Arm]:
    free: dict[tuple[str, float], Sequence[str]] = {}

    def query_aware(made: GeneratedConversation, question: Question, ratio: float) -> Sequence[str]:
        return compress(turns_of(made), Target(ratio, query=question.text), count).contents

    def query_free(made: GeneratedConversation, _: Question, ratio: float) -> Sequence[str]:
        if (made.id, ratio) not in free:
            free[made.id, ratio] = compress(turns_of(made), Target(ratio), count).contents
        return free[made.id, ratio]

    def most_recent(made: GeneratedConversation, _: Question, ratio: float) -> Sequence[str]:
        return _within(made, list(range(len(made.utterances)))[::-1], ratio)

    def random_turns(made: GeneratedConversation, question: Question, ratio: float) -> Sequence[str]:
        order = list(range(len(made.utterances)))
        random.Random(question.id).shuffle(order)
        return _within(made, order, ratio)

    def random_words(made: GeneratedConversation, question: Question, ratio: float) -> Sequence[str]:
        chance = random.Random(question.id)
        return [" ".join(w for w in one.text.split() if chance.random() < 1 / ratio) for one in made.utterances]

    counted: dict[str, list[int]] = {}

    def _within(made: GeneratedConversation, order: Sequence[int], ratio: float) -> Sequence[str]:
        if made.id not in counted:
            counted[made.id] = count([one.text for one in made.utterances])
        room, left = sum(counted[made.id]) / ratio, [""] * len(made.utterances)
        for number in order:
            room -= counted[made.id][number]
            if room < 0:
                break
            left[number] = made.utterances[number].text
        return left

    return {
        "query-aware": query_aware,
        "query-free": query_free,
        "random turns": random_turns,
        "random words": random_words,
        "most recent": most_recent,
    }


def score(question: Question, left: Sequence[str]) -> tuple[float, bool]:
    """Return the share of the answer's words that are left in its evidence, and whether all of it is left."""
    assert question.answer is not None
    wanted = [word for word in words(question.answer) if word not in STOP_WORDS["en"]] or words(question.answer)
    numbers = [int(one.partition(".")[2]) for one in question.evidence]
    found = {word for number in numbers for word in words(left[number])}
    share = sum(word in found for word in wanted) / len(wanted)
    return share, share == 1 and all(left[number] for number in numbers)


def retention(seed: int, sample: int | None, ratios: Sequence[float], count: Count) -> list[dict[str, object]]:
    made = generate(seed)
    asked = [pair for pair in questions(made) if pair[1].answer is not None]
    if sample is not None:
        asked = random.Random(seed).sample(asked, min(sample, len(asked)))
    rows = []
    for ratio in ratios:
        for name, arm in arms(count).items():
            shares, whole, after, seconds = [], [], [], []
            kinds: dict[str, list[float]] = defaultdict(list)
            for one, question in asked:
                began = time.perf_counter()
                left = arm(one, question, ratio)
                seconds.append(time.perf_counter() - began)
                share, is_whole = score(question, left)
                shares.append(share)
                whole.append(is_whole)
                kinds[question.kind].append(share)
                after.append(sum(count([one.text for one in one.utterances])) / max(1, sum(count(left))))
            row = {
                "ratio": ratio, "arm": name, "questions": len(asked), "kept": statistics.mean(shares),
                "whole": statistics.mean(whole), "real_ratio": statistics.mean(after),
                "seconds": statistics.median(seconds),
                "kinds": {kind: statistics.mean(values) for kind, values in sorted(kinds.items())},
            }  # fmt: skip
            rows.append(row)
            of_kinds = "  ".join(f"{kind} {statistics.mean(values):.3f}" for kind, values in sorted(kinds.items()))
            print(
                f"{ratio:g}x  {name:13} kept {row['kept']:.3f}  whole {row['whole']:.3f}  real ratio "
                f"{row['real_ratio']:.2f}  {row['seconds'] * 1000:.0f} ms   {of_kinds}",
                flush=True,
            )
    return rows


def answers(seed: int, number: int, model: str, count: Count) -> list[dict[str, object]]:
    """A model answers from whole conversations and from compressed ones: 24 utterances around the evidence of each."""
    from app.inference.requests import ChatMessage, GenerateRequest, Sampling
    from workers.engine.engine import LlamaEngine
    from workers.engine.options import EngineOptions

    entry = files.read_catalog().get(model)
    path = files.locate(entry, load().settings.data_dir)
    asked = [pair for pair in questions(generate(seed, 50, 60)) if pair[1].answer is not None]
    asked = [_window(*pair) for pair in random.Random(seed).sample(asked, min(number, len(asked)))]
    of_arms = arms(count)
    contexts: dict[str, tuple[Arm, float]] = {
        "full": (lambda made, _, __: [one.text for one in made.utterances], 1),
        "query-aware 2x": (of_arms["query-aware"], 2),
        "query-aware 3x": (of_arms["query-aware"], 3),
        "query-aware 8x": (of_arms["query-aware"], 8),
        "random turns 2x": (of_arms["random turns"], 2),
        "most recent 2x": (of_arms["most recent"], 2),
        "no context": (lambda made, _, __: [""] * len(made.utterances), 1),
    }
    engine = LlamaEngine(path, EngineOptions(slots=1, context=4096, threads=1, profile=entry.prompt))
    rows = []
    try:
        for name, (arm, ratio) in contexts.items():
            right = 0
            for made, question in asked:
                left = arm(made, question, ratio)
                told = "\n".join(
                    f"{one.speaker}: {text}" for one, text in zip(made.utterances, left, strict=True) if text
                )
                text = f"{told}\n\nAnswer in a few words, from the conversation above: {question.text}"
                is_chat = "chat" in entry.use_cases
                request = GenerateRequest(
                    messages=(ChatMessage("user", text),) if is_chat else (),
                    prompt=None if is_chat else f"{told}\n\nQuestion: {question.text}\nAnswer:",
                    max_tokens=24, sampling=Sampling(temperature=0, seed=1), stop=() if is_chat else ("\n",),
                )  # fmt: skip
                said = words(engine.generate(request).result(timeout=600).text)
                right += all(word in said for word in words(question.answer or ""))
            rows.append({"model": model, "context": name, "questions": len(asked), "right": right / len(asked)})
            print(f"{model}  {name:16} right {right / len(asked):.3f} of {len(asked)}", flush=True)
    finally:
        engine.close()
    return rows


def _window(made: GeneratedConversation, question: Question) -> tuple[GeneratedConversation, Question]:
    """Return the utterances of the evidence with others between and around them, as a conversation of its own."""
    needed = {int(one.partition(".")[2]) for one in question.evidence}
    others = [number for number in range(len(made.utterances)) if number not in needed]
    others.sort(key=lambda number: min(abs(number - one) for one in needed))
    kept = sorted([*needed, *others[: 24 - len(needed)]])
    return GeneratedConversation(question.id, made.speakers, [made.utterances[number] for number in kept]), question


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=REPORTED)
    parser.add_argument("--questions", type=int, help="a sample of so many questions")
    parser.add_argument("--ratios", type=float, nargs="+", default=[2.0, 3.0, 5.0])
    parser.add_argument("--tokenizer", default="smollm2:135m", help="the model whose tokenizer counts")
    parser.add_argument("--answers", type=int, default=0, help="also let a model answer so many questions")
    parser.add_argument("--model", default="smollm2:135m", help="the model that answers")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/compression.json"))
    given = parser.parse_args()
    vocabulary = Vocabulary(files.locate(files.read_catalog().get(given.tokenizer), load().settings.data_dir))
    known: dict[str, int] = {}

    def count(texts: Sequence[str]) -> list[int]:
        for text in texts:
            if text not in known:
                known[text] = vocabulary.count([text])[0]
        return [known[text] for text in texts]

    result: dict[str, object] = {"seed": given.seed, "tokenizer": given.tokenizer}
    result["retention"] = retention(given.seed, given.questions, given.ratios, count) if given.ratios != [0] else []
    if given.answers:
        result["answers"] = answers(given.seed, given.answers, given.model, count)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

"""
How often a small model is right in the demo: the step `topic` of support-triage, on messages labelled by hand.

The prompt was chosen on `messages/development.csv`; `messages/held_out.csv` was not looked at meanwhile. Engine, prompt
and grammar are those of the workflow. What counts is the share of messages with the right topic.

`python -m benchmarks.demo_quality [--models NAME,…] [--set held_out|development] [--every N] [--threads N] [--json F]`
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from app.catalog import files
from app.inference import prompts
from app.kernel import settings
from app.workflows import registry
from app.workflows.language.steps import GenerateFields
from workers.engine.engine import LlamaEngine
from workers.pool import pool

MESSAGES = Path(__file__).parent / "messages"
MODELS = ("gemma3:270m", "smollm2:135m")
WORKFLOW, STEP = "support-triage", "topic"
#: A message that takes longer than this fails the measurement.
MOST_SECONDS = 600


@dataclass(frozen=True, slots=True)
class Message:
    """A labelled message."""

    topic: str
    language: str
    message: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The topic that a model has chosen for a message."""

    message: Message
    topic: str

    @property
    def right(self) -> bool:
        return self.topic == self.message.topic


def read(name: str, every: int = 1) -> list[Message]:
    """Read a set of messages; of each topic every n-th."""
    with (MESSAGES / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return [Message(**row) for row in csv.DictReader(file)][::every]


def choose(engine: LlamaEngine, messages: Sequence[Message]) -> list[Answer]:
    """Ask a model for the topics of the messages, as the workflow does."""
    step = registry.shipped()[WORKFLOW].definition.step(STEP)
    assert isinstance(step, GenerateFields)
    data = [{"inputs": {"message": message.message}, "steps": {}, "run": {}} for message in messages]
    tickets = [engine.generate(prompts.request_of(step, each, priority="batch", attempt=1)) for each in data]
    topics = [json.loads(ticket.result(timeout=MOST_SECONDS).text) for ticket in tickets]
    return [Answer(*pair) for pair in zip(messages, topics, strict=True)]


def load(name: str, folder: Path, threads: int) -> LlamaEngine:
    """Load a model of the catalogue as its pool would; the folder holds a file that has to be joined."""
    model = files.read_catalog().get(name)
    path = files.pull(model, folder)
    return LlamaEngine(
        path, pool.options_of(model, settings.load(environment={}).settings, gpus=False, threads=threads)
    )


def share(answers: Sequence[Answer]) -> float:
    """The share of right answers."""
    return sum(answer.right for answer in answers) / max(len(answers), 1)


def report(model: str, answers: Sequence[Answer], seconds: float) -> None:
    """Print the figures of a model."""
    print(f"\n{model}: {sum(answer.right for answer in answers)} of {len(answers)} right, {share(answers):.1%}")
    print(f"  {seconds:.0f} s, {seconds / len(answers):.2f} s per message")
    for field in ("topic", "language"):
        values = sorted({getattr(answer.message, field) for answer in answers})
        groups = {value: [one for one in answers if getattr(one.message, field) == value] for value in values}
        print("  " + "  ".join(f"{value} {share(group):.0%} of {len(group)}" for value, group in groups.items()))
    wrong = Counter((answer.message.topic, answer.topic) for answer in answers if not answer.right)
    for (right, chosen), count in wrong.most_common():
        print(f"  {count} x {right} taken for {chosen}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--set", choices=("held_out", "development"), default="held_out")
    parser.add_argument("--every", type=int, default=1, help="only every n-th message")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    messages, found = read(options.set, options.every), {}
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory(prefix="arriero-quality-") as folder:
            engine = load(name, Path(folder), options.threads)
            began = time.monotonic()
            answers = choose(engine, messages)
            seconds = time.monotonic() - began
            engine.close()
        report(name, answers, seconds)
        found[name] = {
            "set": options.set,
            "right": share(answers),
            "seconds": seconds,
            "answers": [asdict(answer.message) | {"chosen": answer.topic} for answer in answers],
        }
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()

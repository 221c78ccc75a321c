"""
Refine: what verification mends, and what it breaks. Order messages become JSON, arms side by side.

    nice python -m benchmarks.refine --json refine.json        # 200 items of the reported seed
    nice python -m benchmarks.refine --seed 7 --items 30       # the set on which the step was written

Each arm is a `refine` step, whose workflow is executed here step by step, with the engine in this process. The
truth is known from the generation of the messages and is never shown to a verifier. An item is right if all its
fields are. Flips are counted against the truth, from the first draft of an item to the output that was kept.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.catalog import files
from app.catalog.model import PromptProfile
from app.inference import prompts, step_outputs
from app.kernel import settings
from app.kernel.errors import StepFailure
from app.workflows.expressions import conditions, transforms
from app.workflows.language.definition import needs_of
from app.workflows.language.generate_fields import GenerateFields
from app.workflows.language.refine import RefineFields
from app.workflows.language.steps import AnyStep, TransformFields
from app.workflows.language.verification import VerifyFields
from app.workflows.state_machine.outcomes import Called
from workers.engine.engine import LlamaEngine
from workers.pool import pool
from workers.refinement import outputs
from workers.refinement import step as refinement
from workers.refinement.judge import TokensUsed
from workers.refinement.step import VerifyContext

#: The seed of the set on which prompts and verifiers were chosen, and that of the reported one.
TUNED, REPORTED = 7, 20261122
SMALL, LARGE = "smollm2:135m", "gemma3:270m"
MOST_SECONDS = 600

_FIRST = [
    "Ana",
    "Ben",
    "Carla",
    "David",
    "Elena",
    "Farid",
    "Greta",
    "Hugo",
    "Irina",
    "Jonas",
    "Kira",
    "Luis",
    "Mara",
    "Nils",
    "Olga",
    "Pavel",
    "Rosa",
    "Sven",
    "Tara",
    "Uwe",
]
_LAST = [
    "Ruiz",
    "Novak",
    "Berg",
    "Costa",
    "Weber",
    "Haddad",
    "Lind",
    "Moreau",
    "Petrov",
    "Okafor",
    "Silva",
    "Tanaka",
    "Vogel",
    "Young",
    "Zeman",
    "Adler",
]
_ITEMS = [
    *("blue lamps", "oak chairs", "coffee mugs", "wool blankets", "garden hoses", "desk fans", "paper boxes"),
    *("steel hooks", "candle holders", "rain jackets", "glass jars", "picture frames", "door mats", "clay pots"),
]
_CITIES = ["Lisbon", "Graz", "Oslo", "Turin", "Porto", "Ghent", "Lyon", "Riga", "Malaga", "Bergen", "Krakow", "Zurich"]
_SPELLED = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_MESSAGES = (
    "Hello, this is {name} from {city}. Please send me {count} {item}. My number is {phone}.",
    "{name} here. Last year I took {other} {wrong}, but this time I want {count} {item}. Ship them to {city}.",
    "Dear team, we need {count} {item} in {city} by the {day}th. Regards, {name}",
    "Can you deliver {count} {item} to {city}? I live in {street} {other}. Thanks, {name}",
    "Order from {name}: {item}, quantity {count}, for our shop in {city}. Customer id {phone}.",
    "Hi! It's {name}. I saw your {wrong} for {other} euros. I would like {count} {item} instead, to {city}.",
)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "item": {"type": "string", "maxLength": 40},
        "quantity": {"type": "integer", "minimum": 1, "maximum": 9999},
        "city": {"type": "string", "maxLength": 40},
    },
    "required": ["name", "item", "quantity", "city"],
    "additionalProperties": False,
}
_TASK = "Read the order and write JSON with the fields name, item, quantity and city.\n\nOrder: "
_EXAMPLES = (
    (
        "Good day, I am Peter Falk. I want to buy 14 red cups for my house in Vienna, street 3.",
        '{"name": "Peter Falk", "item": "red cups", "quantity": 14, "city": "Vienna"}',
    ),
    (
        "Two weeks ago I got 5 pens. Now send six silver spoons to Prague, please. Yours, Lena Wolf",
        '{"name": "Lena Wolf", "item": "silver spoons", "quantity": 6, "city": "Prague"}',
    ),
    (
        "Milan shop, Tom Reed speaking, id 8831: the order is 120 green bags.",
        '{"name": "Tom Reed", "item": "green bags", "quantity": 120, "city": "Milan"}',
    ),
)
_MESSAGES_TO_MODEL: list[dict[str, str]] = [
    *(
        message
        for order, answer in _EXAMPLES
        for message in ({"role": "user", "content": _TASK + order}, {"role": "assistant", "content": answer})
    ),
    {"role": "user", "content": _TASK + "{{ inputs.message }}"},
]
VERIFIERS: list[dict[str, Any]] = [
    {"kind": "schema", "schema": SCHEMA},
    {"kind": "grounding", "sources": "inputs.message", "weight": 2},
    {
        "kind": "checks",
        "checks": [
            {
                "name": "no digits in names",
                "that": "!(string(output.name) + string(output.item) + string(output.city)).matches('[0-9]')",
                "message": "name, item and city have no digits",
            },
            {
                "name": "city",
                "that": "!output.city.matches('(?i)(street|lane|road)')",
                "message": "the city is the town, not the street",
            },
            {
                "name": "different",
                "that": "output.name != output.item && output.name != output.city && output.item != output.city",
                "message": "name, item and city are different things",
            },
        ],
    },
]


@dataclass(frozen=True, slots=True)
class OrderMessage:
    """A message, and what it says."""

    text: str
    truth: Mapping[str, Any]


def generate(seed: int, count: int) -> list[OrderMessage]:
    """Return messages with their truth; the same for the same seed."""
    chance = random.Random(seed)
    made = []
    for _ in range(count):
        item, wrong = chance.sample(_ITEMS, 2)
        number = chance.randint(2, 60)
        name, city = f"{chance.choice(_FIRST)} {chance.choice(_LAST)}", chance.choice(_CITIES)
        said = _SPELLED[number - 2] if number <= 12 and chance.random() < 0.5 else str(number)
        text = chance.choice(_MESSAGES).format(
            name=name,
            city=city,
            item=item,
            count=said,
            wrong=wrong,
            other=chance.randint(2, 60),
            day=chance.randint(4, 20),
            phone=chance.randint(10_000, 99_999),
            street=chance.choice(("Mill Lane", "High Street", "Park Road")),
        )
        made.append(OrderMessage(text, {"name": name, "item": item, "quantity": number, "city": city}))
    return made


def is_right(value: Any, truth: Mapping[str, Any]) -> bool:
    """Whether all fields are right."""
    return isinstance(value, Mapping) and all(
        outputs.normal(value.get(key)) == outputs.normal(wanted) for key, wanted in truth.items()
    )


def arms() -> dict[str, dict[str, Any]]:
    """Return the steps that are compared."""
    free = {
        "model": SMALL,
        "messages": _MESSAGES_TO_MODEL,
        "max_tokens": 64,
        "sampling": {"temperature": 0.0, "seed": 1},
        "retry": {"max_attempts": 1},
    }
    grammar = {**free, "output": {"schema": SCHEMA}}
    mending = [{"action": "refine"}, {"action": "resample", "rounds": 2, "temperature": 0.6}]
    critique = {"action": "critique", "max_tokens": 48}
    shadow = {"verifiers": VERIFIERS, "accept": "critic"}
    return {
        "free": {"draft": free, "policy": [], **shadow},
        "critique only": {"draft": free, "policy": [critique], **shadow},
        "grammar": {"draft": grammar, "policy": [], **shadow},
        "grammar + verify": {"draft": grammar, "verifiers": VERIFIERS, "policy": mending},
        "+ escalate": {
            "draft": grammar,
            "verifiers": VERIFIERS,
            "policy": [*mending, {"action": "escalate", "model": LARGE}],
        },
    }


@dataclass(slots=True)
class Executor:
    """Executes the workflow of a step in this process. Equal requests with a seed are computed once."""

    engines: Mapping[str, LlamaEngine]
    known: dict[str, tuple[Any, TokensUsed, str]] = field(default_factory=dict)

    def run(self, step: Mapping[str, Any], message: str) -> Mapping[str, Any]:
        """Return the report of a refine step for a message."""
        fields = RefineFields.model_validate({"kind": "refine", **step})
        called = refinement.refine(fields, {"inputs": {"message": message}}, None, None, "confined")
        return self._execute(called)

    def _execute(self, called: Called) -> Mapping[str, Any]:
        steps: dict[str, Any] = {}
        used: dict[str, TokensUsed] = {}
        data = {"inputs": dict(called.inputs), "steps": steps, "run": {}}
        context = VerifyContext(lambda keys: {key: used[key] for key in keys if key in used}, lambda *_: None)
        for step in called.definition.steps:
            output, error = None, ""
            if self._starts(step, data):
                if isinstance(step, GenerateFields):
                    output, used[step.id], error = self._generate(step, data)
                elif isinstance(step, VerifyFields):
                    output = refinement.verify(step, data, context).output
                elif isinstance(step, TransformFields):
                    output = transforms.evaluate(data, cel=step.cel)
            state = "failed" if error else "skipped" if output is None else "succeeded"
            steps[step.id] = {"state": state, "output": output, "error": {"message": error} if error else None}
        parts = called.definition.output_parts()
        return {name: conditions.evaluate(part.value, data) for name, part in parts.items()}

    @staticmethod
    def _starts(step: AnyStep, data: Mapping[str, Any]) -> bool:
        if step.join == "all" and any(data["steps"][key]["state"] != "succeeded" for key, _ in needs_of(step)):
            return False
        return step.when is None or conditions.evaluate_bool(step.when, data)

    def _generate(self, step: GenerateFields, data: Mapping[str, Any]) -> tuple[Any, TokensUsed, str]:
        request = prompts.request_of(step, data, priority="batch", attempt=1)
        assert step.model is not None, "the plan names the models"
        key = f"{step.model} {request!r}"
        if key not in self.known:
            try:
                made = self.engines[step.model].generate(request).result(timeout=MOST_SECONDS)
                used = TokensUsed(step.model, made.tokens_in, made.tokens_out)
                self.known[key] = step_outputs.output_of(step, made), used, ""
            except StepFailure as failure:
                self.known[key] = None, TokensUsed(step.model), failure.message
        return self.known[key]


@dataclass(slots=True)
class ArmFigures:
    """What an arm did."""

    items: int = 0
    valid: int = 0
    right_before: int = 0
    right: int = 0
    wrong_to_right: int = 0
    right_to_wrong: int = 0
    #: Outputs that the verifiers passed and that are wrong; that they refused and that are right.
    passed_wrong: int = 0
    refused_right: int = 0
    tokens_draft: int = 0
    tokens_after: int = 0
    replaced: int = 0

    def add(self, report: Mapping[str, Any] | str, truth: Mapping[str, Any]) -> None:
        """Count an item; a text says why it has no output."""
        if isinstance(report, str):
            print(report, flush=True)
            self.items += 1
            return
        first, kept = report["rounds"][0], report["rounds"][report["kept"] or 0]
        before, after = is_right(first["output"], truth), is_right(report["output"], truth)
        self.items += 1
        self.valid += all(one["passed"] for one in kept["checks"] if one["verifier"] == "schema")
        self.right_before += before
        self.right += after
        self.wrong_to_right += after and not before
        self.right_to_wrong += before and not after
        self.passed_wrong += bool(kept["passed"]) and not after
        self.refused_right += not kept["passed"] and after
        self.replaced += bool(report["kept"])
        self.tokens_draft += report["tokens"]["draft"]
        self.tokens_after += report["tokens"]["after_draft"]

    def document(self) -> dict[str, Any]:
        """Return the figures, with what follows from them."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        mended = self.wrong_to_right
        return {
            **fields,
            "errors": self.items - self.right,
            "tokens_for_each_mended": round(self.tokens_after / mended) if mended else None,
            "broken_for_each_mended": round(self.right_to_wrong / mended, 3) if mended else None,
        }


def measure(seed: int, items: int, names: Sequence[str], show: int = 0) -> dict[str, Any]:
    """Run the arms over the messages of a seed."""
    host = settings.load(environment={}).settings
    catalog = files.read_catalog()
    messages = generate(seed, items)
    found: dict[str, ArmFigures] = {name: ArmFigures() for name in names}
    with tempfile.TemporaryDirectory() as folder:
        engines = {}
        for name in (SMALL, LARGE):
            entry = catalog.get(name)
            files.pull(entry, Path(folder))
            options = pool.options_of(entry, host, gpus=False, threads=1)
            if name == LARGE:
                # The shipped file is the base model, which has no chat template: it continues the examples.
                options = options.model_copy(update={"profile": PromptProfile(chat_template="gemma")})
            engines[name] = LlamaEngine(files.locate(entry, Path(folder)), options)
        executor = Executor(engines)
        began = time.monotonic()

        def reports_of(message: OrderMessage) -> dict[str, Any]:
            reports: dict[str, Any] = {}
            for name in names:
                try:
                    reports[name] = executor.run(arms()[name], message.text)
                except StepFailure as failure:
                    reports[name] = failure.message
            return reports

        with ThreadPoolExecutor(4) as threads:
            for number, (message, reports) in enumerate(zip(messages, threads.map(reports_of, messages), strict=True)):
                for name, report in reports.items():
                    found[name].add(report, message.truth)
                if show:
                    print(message.text, *_shown(reports[names[-1]]), sep="\n  ", flush=True)
                if (number + 1) % 10 == 0:
                    print(f"{number + 1} items, {time.monotonic() - began:.0f} s", _line(found), flush=True)
        for engine in engines.values():
            engine.close()
    return {"seed": seed, "items": items, "arms": {name: one.document() for name, one in found.items()}}


def _shown(report: Any) -> list[str]:
    if isinstance(report, str):
        return [report]
    return [f"{one['action']} {one['score']} {one['output']} {one.get('error', '')}" for one in report["rounds"]]


def _line(found: Mapping[str, ArmFigures]) -> str:
    return "; ".join(
        f"{name} {one.right}/{one.items} (+{one.wrong_to_right} -{one.right_to_wrong})" for name, one in found.items()
    )


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=REPORTED)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--arms", default=",".join(arms()))
    parser.add_argument("--show", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = measure(given.seed, given.items, given.arms.split(","), given.show)
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1))
    print("| arm | valid | right | errors | wrong to right | right to wrong | passed, but wrong | refused, but right |")
    print("|---|---|---|---|---|---|---|---|")
    for name, one in found["arms"].items():
        row = (one["valid"], one["right"], one["errors"], one["wrong_to_right"], one["right_to_wrong"])
        print(f"| {name} | {' | '.join(map(str, row))} | {one['passed_wrong']} | {one['refused_right']} |")
    for name, one in found["arms"].items():
        print(f"{name}: {one['tokens_draft']} tokens of drafts, {one['tokens_after']} after; ", end="")
        print(f"{one['tokens_for_each_mended']} for each mended item")


if __name__ == "__main__":
    main()

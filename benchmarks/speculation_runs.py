"""
Runs of the engine's benchmark with and without speculation: two engines in one process take turns, text by text.

Copying: a text to repeat, code to write out again, a list to write as JSON by a schema, a paragraph to edit.
Repetition: records and a list that stood twice before, to be continued without a chat template.
Extraction: orders as JSON by a schema whose keys the model does not know from its prompt.
Dialogue: stories and explanations, whose words stand nowhere before.
Ratios are of the time for each written token, without speculation to with it; medians over the turns. Prompts are
computed before, and reused.
With a `draft`, the path of a draft model, the engine with speculation has one; `assumed_ratio` is what a decode of it
is assumed to cost before it was measured, as a part of one of the model.
CPU ratios, with one thread, do not depend on other programs.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

_PARAGRAPH = (
    "The llamas of the high Andes carry salt, wool and potatoes along the old roads of the Inca. Each train has a "
    "leader with a red bell, and the drivers walk behind it with their dogs. In the dry season the trains cross the "
    "passes before noon, because the wind rises in the afternoon and the animals refuse to go on."
)
_CODE = """def load_orders(path):
    orders = []
    with open(path) as file:
        for line in file:
            name, amount, price = line.split(",")
            orders.append({"name": name, "amount": int(amount), "price": float(price)})
    return orders
"""
_PEOPLE = "\n".join(
    (
        "Ana Lopez, Cusco, 34",
        "Ben Okafor, Lagos, 51",
        "Carla Rossi, Turin, 29",
        "Eva Lind, Malmo, 38",
        "Farid Haddad, Oran, 62",
    )
)
_LINES = "\n".join(
    f'{{"name": "{name}", "city": "{city}", "age": {age}}}'
    for name, city, age in (line.split(", ") for line in _PEOPLE.splitlines())
)
_RECORDS = {
    "type": "array",
    "minItems": 5,
    "maxItems": 5,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "city": {"type": "string", "maxLength": 24},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
        },
        "required": ["name", "city", "age"],
        "additionalProperties": False,
    },
}
#: Its keys stand in no prompt.
_ORDER = {
    "type": "object",
    "properties": {
        "customer_name": {"type": "string", "maxLength": 24},
        "delivery_address": {
            "type": "object",
            "properties": {
                "street_and_number": {"type": "string", "maxLength": 24},
                "postal_code": {"type": "string", "maxLength": 8},
            },
            "required": ["street_and_number", "postal_code"],
            "additionalProperties": False,
        },
        "total_amount": {"type": "integer", "minimum": 0, "maximum": 9999},
        "payment_method": {"enum": ["credit_card", "bank_transfer", "cash_on_delivery"]},
        "is_express_delivery": {"type": "boolean"},
    },
    "required": ["customer_name", "delivery_address", "total_amount", "payment_method", "is_express_delivery"],
    "additionalProperties": False,
}
#: Name, prompt and schema of each text.
WORKLOADS: dict[str, list[tuple[str, str, dict[str, Any] | None]]] = {
    "copying": [
        ("repeat", f"Repeat the following text exactly, word for word:\n\n{_PARAGRAPH}", None),
        ("code", f"Write out this code again, unchanged:\n```python\n{_CODE}```", None),
        ("json", f"Write these people as JSON records:\n{_PEOPLE}", _RECORDS),
        ("edit", f"Write this paragraph again, with 'horses' in the place of 'llamas':\n\n{_PARAGRAPH}", None),
    ],
    "repetition": [
        ("records", f"Records:\n{_LINES}\n\nRecords:\n{_LINES}\n\nRecords:\n", None),
        ("paragraph", f"Text: {_PARAGRAPH}\n\nText: {_PARAGRAPH}\n\nText:", None),
    ],
    "extraction": [
        ("order", "Order of Ana Lopez, Calle Sol 5, 08001. She pays 420 by card, and it is urgent.", _ORDER),
        ("letter", "Ben Okafor lives at 12 Marina Road, 101001, wants it next week, and sends 75 by bank.", _ORDER),
    ],
    "dialogue": [
        ("story", "Tell me a story about a boy who finds a lamp.", None),
        ("sky", "Why is the sky blue? Explain it to a child.", None),
        ("letter", "Write a letter to a friend about your holiday in the mountains.", None),
    ],
}  # fmt: skip


def run_speculation(spec: dict[str, Any]) -> dict[str, float]:
    """Return the ratios of one workload at `streams` texts at a time, and how many drafts were accepted."""
    from app.inference.requests import ChatMessage, GenerateRequest, Sampling
    from benchmarks.engine_runs import model_path
    from workers.engine.engine import LlamaEngine
    from workers.engine.options import DraftFile, EngineOptions

    streams, ratio = spec["streams"], spec.get("assumed_ratio")
    draft = DraftFile(path=Path(spec["draft"])) if spec.get("draft") else None
    engines = {
        choice: LlamaEngine(
            model_path(),
            EngineOptions(
                slots=streams, context=streams * 1024, threads=spec["threads"], vectors=False, speculation=choice,
                draft=draft if choice == "auto" else None,
            ),
        )
        for choice in ("auto", "off")
    }  # fmt: skip
    drafts = engines["auto"]._loop.speculator.model_drafts
    if drafts is not None and ratio is not None:
        drafts.costs.ratio = ratio
    is_raw = spec["workload"] == "repetition"
    sampling = Sampling(temperature=spec["temperature"], seed=7)

    def timed(choice: str, texts: Sequence[tuple[str, str, dict[str, Any] | None]]) -> tuple[float, float, list[str]]:
        requests = [
            GenerateRequest(
                max_tokens=spec["tokens"], sampling=sampling, schema=schema, keeps_cut=True,
                **({"prompt": prompt} if is_raw else {"messages": (ChatMessage("user", prompt),)}),
            )
            for _, prompt, schema in texts
        ]  # fmt: skip
        begun, cpu = perf_counter(), process_time()
        results = [ticket.result() for ticket in [engines[choice].generate(request) for request in requests]]
        wall, cpu = perf_counter() - begun, process_time() - cpu
        written = sum(result.tokens_out for result in results)
        return wall / written, cpu / written, [result.text for result in results]

    texts = WORKLOADS[spec["workload"]]
    groups = [[text] for text in texts] if streams == 1 else [[texts[n % len(texts)] for n in range(2 * streams)]]
    began = engines["auto"].metrics().tokens_drafted
    for choice in engines:  # prompts are computed once, and costs learned
        for group in groups:
            timed(choice, group)
    before = engines["auto"].metrics()
    wall: list[float] = []
    cpu: list[float] = []
    figures: dict[str, float] = {}
    same = count = 0
    for group in groups:
        of_group: list[float] = []
        for turn in range(spec["turns"]):
            order = ("auto", "off") if turn % 2 else ("off", "auto")
            found = {choice: timed(choice, group) for choice in order}
            wall.append(found["off"][0] / found["auto"][0])
            of_group.append(found["off"][1] / found["auto"][1])
            same += sum(a == b for a, b in zip(found["auto"][2], found["off"][2], strict=True))
            count += len(group)
        cpu += of_group
        if streams == 1:
            figures[f"{group[0][0]}_cpu_ratio"] = statistics.median(of_group)
    after = engines["auto"].metrics()
    for engine in engines.values():
        engine.close()
    drafted = after.tokens_drafted - before.tokens_drafted
    return figures | {
        "wall_ratio": statistics.median(wall),
        "cpu_ratio": statistics.median(cpu),
        "drafted_percent": 100 * drafted / (after.tokens_out - before.tokens_out),
        "accepted_percent": 100 * (after.tokens_accepted - before.tokens_accepted) / max(1, drafted),
        "drafted_at_first": before.tokens_drafted - began,
        "drafted_by_model": 0 if drafts is None else drafts.drafted,
        "equal_texts_percent": 100 * same / count,
    }

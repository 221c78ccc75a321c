"""
The real-estate library against seeded truth: valuations, forecasts, leads, documents and texts.

    nice python -m benchmarks.real_estate --json real_estate.json              # the reported seeds, with models
    nice python -m benchmarks.real_estate --without-models                     # only what code computes

Valuations are of sales that were held out, beside the median of their area and that per square foot. The coverage is
the share of them within the interval of 80 %. Forecasts are of the last twelve months, beside the same months of the
year before. Grades from the topics of a model are compared with those from the true ones. Documents are read from PDFs.
Prompts and thresholds were chosen on other seeds.
"""

from __future__ import annotations

import argparse
import base64
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from app.catalog import files
from app.inference import prompts, step_outputs
from app.kernel.clock import now
from app.real_estate import documents, forecast, languages, leads, replies, statements, valuation
from app.workflows import registry
from app.workflows.expressions import templates
from app.workflows.language.generate_fields import GenerateFields
from app.workflows.language.steps import JoinStep, work_of
from benchmarks import real_estate_data
from workers.engine.engine import LlamaEngine
from workers.pool import pool

VALUATION_SEEDS, SERIES_SEEDS, LEAD_SEED, PAPER_SEED = (101, 102, 103, 104), range(100, 160), 77, 78
MESSAGES: Mapping[str, str] = {
    "en": "Hello, is the house still available and what does it cost?",
    "fr": "Bonjour, la maison est-elle encore disponible et quel est le prix ?",
    "de": "Guten Tag, ist das Haus noch zu haben und was kostet es?",
    "es": "Hola, ¿todavía está disponible la casa y cuánto cuesta?",
    "hi": "नमस्ते, क्या घर अभी भी उपलब्ध है और इसकी कीमत क्या है?",
    "pt": "Olá, a casa ainda está disponível e quanto custa?",
    "it": "Buongiorno, la casa è ancora disponibile e quanto costa?",
    "th": "สวัสดีครับ บ้านยังว่างอยู่ไหม ราคาเท่าไร",
}
RECORD = {
    "address": "12 Alder Street",
    "price": "485,000",
    "bedrooms": 3,
    "viewing": "2026-12-03",
    "client": "Ana Prado",
}


def valuations(seeds: Sequence[int], held: int) -> dict[str, Any]:
    """The errors of held-out sales, the later half of them after all sales of the table."""
    errors, area, per_foot, inside, widths = [], [], [], 0, []
    for seed in seeds:
        rows = real_estate_data.sales(seed, 2_000)
        chosen = rows[5 : -held // 2 : len(rows) * 2 // held][: held // 2] + rows[-(held // 2) :]
        ids = {row["id"] for row in chosen}
        table = [row for row in rows if row["id"] not in ids]
        for row in chosen:
            home = {name: value for name, value in row.items() if name not in ("id", "date", "price")}
            found = valuation.value(table, home, "2015-05-27")
            price = row["price"]
            near = [one for one in table if one["zipcode"] == row["zipcode"]]
            errors.append(abs(found["estimate"] / price - 1))
            area.append(abs(statistics.median(one["price"] for one in near) / price - 1))
            foot = statistics.median(one["price"] / one["sqft_living"] for one in near) * row["sqft_living"]
            per_foot.append(abs(foot / price - 1))
            inside += found["low"] <= price <= found["high"]
            widths.append((found["high"] - found["low"]) / found["estimate"])
    middle = {"own": errors, "median_of_area": area, "median_per_sqft": per_foot}
    return {
        "homes": len(errors),
        **{f"median_error_{name}": round(statistics.median(some), 4) for name, some in middle.items()},
        **{f"mean_error_{name}": round(statistics.mean(some), 4) for name, some in middle.items()},
        "coverage_of_80": round(inside / len(errors), 4),
        "median_width": round(statistics.median(widths), 4),
    }


def forecasts(seeds: Sequence[int]) -> dict[str, Any]:
    """The errors of forecasts of a year."""
    own, naive, inside, wins = [], [], 0, 0
    for seed in seeds:
        rows = real_estate_data.prices(seed, 120)
        found = forecast.forecast(rows[:108], 12)
        errors, others = [], []
        for ahead, month in enumerate(found["months"]):
            truth = rows[108 + ahead]["MEDIAN_PRICE"]
            errors.append(abs(month["value"] / truth - 1))
            others.append(abs(rows[96 + ahead]["MEDIAN_PRICE"] / truth - 1))
            inside += month["low"] <= truth <= month["high"]
        own += errors
        naive += others
        wins += statistics.mean(errors) < statistics.mean(others)
    return {
        "series": len(seeds),
        "mean_error_own": round(statistics.mean(own), 4),
        "mean_error_naive_seasonal": round(statistics.mean(naive), 4),
        "better_in": wins,
        "coverage_of_80": round(inside / len(own), 4),
    }


class Model:
    """A model in this process, which does the generate steps of the library."""

    def __init__(self, name: str, folder: Path) -> None:
        entry = files.read_catalog().get(name)
        files.pull(entry, folder, lambda _: None)
        options = pool.options_of(entry, _settings(), gpus=False, threads=1)
        self.engine = LlamaEngine(files.locate(entry, folder), options)

    def output(self, work: GenerateFields, data: Mapping[str, Any]) -> Any:
        request = prompts.request_of(work, data, priority="standard", attempt=1)
        return step_outputs.output_of(work, self.engine.generate(request).result(timeout=600))


def _settings() -> Any:
    from app.kernel import settings  # the environment is read where a model is

    return settings.load(environment={}).settings


def _work(workflow: str, step: str) -> Any:
    return work_of(registry.shipped()[f"real-estate-{workflow}"].definition.step(step))


def graded(model: Model | None, count: int) -> dict[str, Any]:
    """Grades from the topics of a model beside those from the true ones."""
    same = near = right = all_ = rejected = asked = asked_right = 0
    for lead in real_estate_data.leads(LEAD_SEED, count):
        true = [{"quote": text, "topic": topic} for text, topic in lead.topics]
        told: Any = lead.conversation
        truth = leads.score_lead(told, true, lead.asking_price)  # type: ignore[arg-type] # they are findings
        sentences = leads.lead_sentences(told)["sentences"]
        known = dict(lead.topics)
        found = []
        for one in sentences:
            sentence, topic = one["text"], one["cue"]
            if not topic:
                data = {"item": sentence, "index": 0}
                topic = "other" if model is None else model.output(_work("lead", "topics"), data)
                asked += 1
                asked_right += topic == known.get(sentence, "other")
            found.append({"quote": sentence, "topic": topic})
            right += topic == known.get(sentence, "other")
            all_ += 1
        got = leads.score_lead(told, found, lead.asking_price)  # type: ignore[arg-type] # they are findings
        rejected += len(got["rejected"])
        same += got["grade"] == truth["grade"]
        near += abs("ABCD".index(got["grade"]) - "ABCD".index(truth["grade"])) <= 1
    return {
        "leads": count,
        "same_grade": round(same / count, 3),
        "within_one_grade": round(near / count, 3),
        "topics_right": round(right / all_, 3),
        "sentences": all_,
        "without_a_cue": asked,
        "right_without_a_cue": asked_right,
        "rejected_findings": rejected,
    }


def read(model: Model | None, count: int) -> dict[str, Any]:
    """Fields of documents: how often they are right, by their confidence."""
    by: dict[float, list[bool]] = {}
    silent = fields = doubted = 0
    for paper in real_estate_data.papers(PAPER_SEED, count):
        found = documents.read_document(pdf=base64.b64encode(real_estate_data.pdf(paper.pages)).decode())
        work = _work("document", "answers")
        answers = [
            None if model is None else model.output(work, {"item": item, "index": 0}) for item in found["fields"]
        ]
        checked = documents.check_fields(found, answers)
        for name, field in checked["fields"].items():
            is_right = field["value"] == paper.truth[name]
            by.setdefault(field["confidence"], []).append(is_right)
            fields += 1
            sure = field["confidence"] >= documents.DOUBT
            doubted += not sure
            silent += sure and not is_right
    return {
        "documents": count,
        "fields": fields,
        "right": round(sum(map(sum, by.values())) / fields, 4),
        "to_a_person": round(doubted / fields, 4),
        "wrong_without_a_doubt": silent,
        "right_by_confidence": {
            str(one): f"{sum(some)} of {len(some)}" for one, some in sorted(by.items(), reverse=True)
        },
    }


def texts(model: Model, count: int) -> dict[str, Any]:
    """How often a draft of a model passes: one of three, and each of them."""
    cases: dict[str, list[tuple[str, dict[str, Any], dict[str, Any]]]] = {"valuation": [], "market": [], "reply": []}
    for seed in range(200, 200 + count):
        rows = real_estate_data.sales(seed, 300)
        home = {name: value for name, value in rows[-1].items() if name not in ("id", "date", "price")}
        value = valuation.value(rows[:-1], home)
        cases["valuation"].append(
            ("", value, {"facts": value["facts"], "cite": value["cite"], "citations": 2, "prefix": value["begin"]})
        )
        series = forecast.forecast(real_estate_data.prices(seed, 96), 12)
        direction = series["trend"]["direction"]
        cases["market"].append(("", series, {"facts": series["facts"], "direction": direction}))
    for code, message in MESSAGES.items():
        facts = replies.reply_facts(message, RECORD)
        assert facts["language"] == code, languages.LANGUAGES
        options = {"facts": facts["facts"], "language": code, "tone": "formal", "never": facts["never"]}
        cases["reply"].append((message, facts, options))
    found: dict[str, Any] = {}
    for name, some in cases.items():
        step = registry.shipped()[f"real-estate-{name}"].definition.step("prompt")
        assert isinstance(step, JoinStep)
        assert step.template is not None
        passed = drafts = good = 0
        kept = []
        for message, figures, options in some:
            steps = {one: {"output": figures} for one in ("figures", "facts")}
            prompt = templates.render(step.template, {"steps": steps, "inputs": {"message": message, "tone": "formal"}})
            output = model.output(
                _work("text", "drafts"), {"inputs": {"prompt": prompt, "prefix": options.get("prefix", "")}}
            )
            written = [choice["text"] for choice in output["choices"]]
            chosen = statements.choose_text(written, "-", **options)
            passed += chosen["by"] == "model"
            kept += [options["language"]] if name == "reply" and chosen["by"] == "model" else []
            drafts += len(chosen["drafts"])
            good += sum(one["passed"] for one in chosen["drafts"])
        found[name] = {"texts": len(some), "kept": passed, "drafts": drafts, "drafts_that_pass": good}
        if name == "reply":
            found[name]["languages_kept"] = kept
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--held", type=int, default=100, help="held-out sales of each market")
    parser.add_argument("--leads", type=int, default=60)
    parser.add_argument("--papers", type=int, default=45)
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--models", nargs="*", default=["smollm2:135m", "gemma3:270m"])
    parser.add_argument("--without-models", action="store_true")
    chosen = parser.parse_args()
    started = time.monotonic()
    found: dict[str, Any] = {"at": now().isoformat()}

    def report(name: str, value: Any) -> None:
        found[name] = value
        print(name, json.dumps(value, indent=1, ensure_ascii=False), f"{time.monotonic() - started:.0f} s", flush=True)
        if chosen.json is not None:
            chosen.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")

    with threadpool_limits(1):
        report("valuations", valuations(VALUATION_SEEDS, chosen.held))
        report("forecasts", forecasts(SERIES_SEEDS))
        report("leads without a model", graded(None, chosen.leads))
        report("documents without a model", read(None, chosen.papers))
        for name in () if chosen.without_models else chosen.models:
            with tempfile.TemporaryDirectory() as folder:
                model = Model(name, Path(folder))
                report(f"leads {name}", graded(model, chosen.leads))
                report(f"documents {name}", read(model, chosen.papers))
                report(f"texts {name}", texts(model, chosen.texts))
                model.engine.close()


if __name__ == "__main__":
    main()

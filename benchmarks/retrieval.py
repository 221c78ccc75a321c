"""
Retrieval: which share of the utterances that answer a question is among the first passages of recall.

    python -m benchmarks.retrieval                  # the reported seeds: 50 conversations and 2,000 questions each
    python -m benchmarks.retrieval --tune           # the seed on which constants are chosen, with others beside them
    python -m benchmarks.retrieval --locomo FILE    # conversations of LoCoMo (locomo10.json, not a part of Arriero)

The conversations are generated (`benchmarks/conversations.py`), and the evidence of each question is known. They are
written with `put_in` into an embedded Postgres, and embedded by all-minilm on llama.cpp; each belongs to a user of its
own, whose passages are searched. Recall@k is the mean, over questions with an answer, of the share of their evidence
among the first k passages. Of questions without an answer, the area under the ROC curve says how well the best cosine
or the best BM25 tells them from the others.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from app.catalog import files
from app.inference.requests import EmbedRequest
from app.kernel import log
from app.kernel.database import Database
from app.kernel.sections.servers import LogSettings
from app.kernel.settings import load
from app.memory.recall import dense, lexical, ranking, service, storage, vectors
from app.memory.recall.passages import NewPassage, SourceKind, embedded_text
from app.memory.recall.query import QueryVectors, RecallQuery
from benchmarks.conversations import generate
from benchmarks.recall_scale import database_in
from workers.engine.engine import LlamaEngine
from workers.engine.options import EngineOptions

#: Constants were chosen on the first; figures are those of the others.
TUNED, REPORTED = 7, (20261122, 20261123)
MODEL = "all-minilm:l6-v2"
NAMESPACE = "retrieval"
DEPTHS = (5, 10, 20)


@dataclass(frozen=True, slots=True)
class AskedQuestion:
    """A question to a conversation, and the ids of the utterances that answer it."""

    conversation: str
    kind: str
    text: str
    evidence: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FoundCandidates:
    """What both searches have found for a question, before it is ranked."""

    lexical: Mapping[int, float]
    dense: Mapping[int, float]
    #: Pairs of passages beside each other, for every candidate.
    pairs: Sequence[tuple[int, int]]


class Embedder:
    """Vectors by all-minilm, in this process."""

    def __init__(self) -> None:
        settings = load().settings
        entry = files.read_catalog().get(MODEL)
        path = files.locate(entry, settings.data_dir)
        self._engine = LlamaEngine(path, EngineOptions(slots=1, embedding_context=256, threads=2, profile=entry.prompt))

    def embed(self, texts: Sequence[str]) -> list[tuple[float, ...]]:
        """The vectors of texts."""
        found: list[tuple[float, ...]] = []
        for first in range(0, len(texts), 128):
            found += self._engine.embed(EmbedRequest(tuple(texts[first : first + 128])), 600.0).vectors
        return found

    def close(self) -> None:
        """Free the model."""
        self._engine.close()


def generated(seed: int, conversations: int) -> tuple[list[NewPassage], list[AskedQuestion]]:
    """Passages and questions of a seed."""
    passages, asked = [], []
    for made in generate(seed, conversations):
        for position, one in enumerate(made.utterances):
            passages.append(_passage(made.id, one.id, position, one.text, one.speaker, datetime.fromisoformat(one.at)))
        asked += [AskedQuestion(made.id, one.kind, one.text, one.evidence) for one in made.questions]
    return passages, asked


def locomo(file: Path) -> tuple[list[NewPassage], list[AskedQuestion]]:
    """Passages and questions of LoCoMo: sessions of two speakers, and questions with the ids of their evidence."""
    kinds = {1: "multi-hop", 2: "temporal", 3: "open", 4: "single-hop", 5: "adversarial"}
    passages, asked = [], []
    for number, sample in enumerate(json.loads(file.read_text())):
        name, known = f"l{number}", set()
        position = itertools.count()
        start = datetime(2023, 1, 1, tzinfo=UTC)
        conversation = sample["conversation"]
        for session in itertools.count(1):
            turns = conversation.get(f"session_{session}")
            if turns is None:
                break
            for turn in turns:
                place = next(position)
                known.add(turn["dia_id"])
                text = " ".join(filter(None, (turn.get("text"), turn.get("blip_caption"))))
                id_ = f"{name}/{turn['dia_id']}"
                passages.append(_passage(name, id_, place, text, turn["speaker"], start + timedelta(hours=place)))
        for one in sample["qa"]:
            found = {part for whole in one.get("evidence", ()) for part in whole.replace(";", " ").split()} & known
            if found:
                evidence = tuple(f"{name}/{part}" for part in sorted(found))
                asked.append(AskedQuestion(name, kinds[one["category"]], one["question"], evidence))
    return passages, asked


def _passage(conversation: str, id_: str, position: int, text: str, speaker: str, at: datetime) -> NewPassage:
    return NewPassage(
        *(NAMESPACE, SourceKind.MESSAGE, id_, text, conversation, conversation, position),
        speaker=speaker, at=at if at.tzinfo else at.replace(tzinfo=UTC),
    )  # fmt: skip


@contextmanager
def stored(passages: Sequence[NewPassage], embedder: Embedder) -> Iterator[Database]:
    """A database with these passages and their vectors."""
    with tempfile.TemporaryDirectory(prefix="retrieval-") as folder, database_in(Path(folder)) as database:
        for first in range(0, len(passages), 500):
            with database.work() as work:
                storage.put_in(work, passages[first : first + 500])
        with database.work() as work:
            vectors.ensure_model(work, MODEL)
        while (model := vectors.find_model(database, MODEL)) and (
            batch := vectors.missing(database, model, 512)
        ).passages:
            made = embedder.embed([embedded_text(one.text, one.speaker) for one in batch.passages])
            vectors.store(database, model, batch, dict(zip((one.id for one in batch.passages), made, strict=True)))
        assert model is not None, "it was made"
        vectors.finish(database, model)
        yield database


def candidates(database: Database, asked: AskedQuestion, vector: Sequence[float]) -> FoundCandidates:
    """What both searches find."""
    query = RecallQuery(asked.text, NAMESPACE, asked.conversation)
    with database.work() as work:
        size = lexical.scope_size(work, query)
        words = lexical.search(work, query, size, lexical.WordFrequencies())
        given = QueryVectors({MODEL: tuple(vector)})
        ((_, cosines),) = dense.search(work, query, size, given, tuple(words.scores)).cosines
        best = sorted({*words.scores, *cosines})
        return FoundCandidates(words.scores, cosines, service._pairs(work, query, best))


def order(
    found: FoundCandidates, arm: str, weight: float = ranking.DENSE_WEIGHT, near: float = ranking.NEIGHBOUR_WEIGHT
) -> list[int]:
    """The ids of the passages in the order of an arm."""
    match arm:
        case "lexical":
            scores = dict(found.lexical)
        case "dense":
            scores = dict(found.dense)
        case "reciprocal ranks":
            scores = defaultdict(float)
            for leg in (found.lexical, found.dense):
                for rank, id_ in enumerate(sorted(leg, key=lambda one: -leg[one])):
                    scores[id_] += 1 / (61 + rank)
        case _:
            scores = ranking.combined(found.lexical, [found.dense], weight)
    best = set(sorted(scores, key=lambda id_: -scores[id_])[: service._MOST_WITH_NEIGHBOURS])
    pairs = [pair for pair in found.pairs if pair[0] in best] if arm == "hybrid" else []
    return [one.id for one in ranking.ranked(scores, pairs, {}, datetime.now(UTC), None, near)]


def recall_at(
    asked: Sequence[AskedQuestion],
    found: Sequence[FoundCandidates],
    ids: Mapping[int, str],
    arm: str,
    **more: float,
) -> dict[str, dict[int, float]]:
    """Recall at each depth by kind of question, and of all with an answer."""
    shares: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for question, one in zip(asked, found, strict=True):
        if not question.evidence:
            continue
        order_ = [ids[id_] for id_ in order(one, arm, **more)[: max(DEPTHS)]]
        for depth in DEPTHS:
            share = len(set(order_[:depth]) & set(question.evidence)) / len(question.evidence)
            for kind in ("all", question.kind):
                shares[kind][depth].append(share)
    return {kind: {depth: statistics.mean(of) for depth, of in depths.items()} for kind, depths in shares.items()}


def separation(asked: Sequence[AskedQuestion], found: Sequence[FoundCandidates], leg: str) -> float | None:
    """The area under the ROC curve of the best score for whether there is an answer."""
    best = [max(getattr(one, leg).values(), default=0.0) for one in found]
    answered = [score for question, score in zip(asked, best, strict=True) if question.evidence]
    absent = [score for question, score in zip(asked, best, strict=True) if not question.evidence]
    if not absent:
        return None
    wins = sum((a > b) + (a == b) / 2 for a in answered for b in absent)
    return wins / (len(answered) * len(absent))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=50)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--locomo", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    log.configure(LogSettings(level="warning"))
    console, results = Console(), []
    seeds: Sequence[int | Path] = [options.locomo] if options.locomo else [TUNED] if options.tune else REPORTED
    embedder = Embedder()
    for seed in seeds:
        passages, asked = locomo(seed) if isinstance(seed, Path) else generated(seed, options.conversations)
        with stored(passages, embedder) as database:
            with database.work() as work:
                rows = work.rows(service.text("SELECT id, source_id FROM passage"))
            ids = {row.id: row.source_id for row in rows}
            said = embedder.embed([one.text for one in asked])
            found = [candidates(database, one, vector) for one, vector in zip(asked, said, strict=True)]
        arms: dict[str, dict[str, Any]] = {
            name: {"arm": name}
            for name in ("dense", "lexical", "reciprocal ranks", "hybrid without neighbours", "hybrid")
        }
        if options.tune or options.locomo:
            for weight, near in itertools.product((0.5, 0.75, 1.0, 1.5), (0.0, 0.1, 0.2, 0.35)):
                arms[f"dense x {weight}, neighbours x {near}"] = {"arm": "hybrid", "weight": weight, "near": near}
        table = Table(
            "arm", *(f"R@{depth}" for depth in DEPTHS), "R@10 by kind", title=f"{seed}: {len(asked)} questions"
        )
        figures: dict[str, Any] = {"seed": str(seed), "questions": len(asked), "passages": len(passages), "arms": {}}
        for name, values in arms.items():
            of = recall_at(asked, found, ids, **values)
            figures["arms"][name] = of
            kinds = ", ".join(f"{kind} {depths[10]:.3f}" for kind, depths in sorted(of.items()) if kind != "all")
            table.add_row(name, *(f"{of['all'][depth]:.3f}" for depth in DEPTHS), kinds)
        for leg in ("lexical", "dense"):
            figures[f"auc_{leg}"] = separation(asked, found, leg)
        console.print(table)
        console.print({name: value for name, value in figures.items() if name.startswith("auc")})
        results.append(figures)
    embedder.close()
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

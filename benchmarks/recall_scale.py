"""
Recall at scale: how long a query takes in a namespace of 10^4, 10^5 and 10^6 passages, and what the index misses.

The passages are synthetic: texts of words with Zipf's frequencies and words of a topic, and vectors of length 1 in
clusters (a topic each, of low rank, with noise of the full one), loaded by COPY into an embedded Postgres of its own.
Queries have two words of a passage and three frequent ones, and a vector near that of the passage. They go through
`Recall`, so the times are those of the search without the embedding of the query.

The recall of the index is the share of the ten nearest passages, as numpy finds them, that the dense leg alone returns.

`python -m benchmarks.recall_scale [--sizes 10000,100000,1000000] [--folder DIR] [--json FILE]`
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg
from rich.console import Console
from rich.table import Table
from sqlalchemy import text

from app.kernel import embedded, log
from app.kernel.database import Database
from app.kernel.sections.servers import LogSettings
from app.memory.recall import vector_index
from app.memory.recall.passages import NewPassage, SourceKind, lexemes_of
from app.memory.recall.query import QueryVectors, RecallMode, RecallQuery, RecallScope
from app.memory.recall.service import Recall

DIMENSIONS, RANK, TOPICS = 384, 48, 2_000
VOCABULARY, TOPIC_WORDS = 60_000, 40
MODEL = "synthetic"
NAMESPACE = "scale"
START = datetime(2025, 1, 1, tzinfo=UTC)
CHUNK = 20_000
#: Users, and the share of all passages that each has; the last one has the rest.
USERS = {"small": 0.001, "middle": 0.02, "large": 0.2}

Vectors = npt.NDArray[np.float16]


class Synthetic:
    """Passages made of chance, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        basis = self.random.standard_normal((RANK, DIMENSIONS))
        self.basis = basis / np.linalg.norm(basis, axis=1, keepdims=True)
        self.centres = self.random.standard_normal((TOPICS, RANK))
        ranks = np.arange(1, VOCABULARY + 1)
        self.cumulated = np.cumsum(1 / ranks**1.05)
        self.cumulated /= self.cumulated[-1]
        self.topic_words = self.random.integers(500, VOCABULARY, (TOPICS, TOPIC_WORDS))

    def vectors(self, topics: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Vectors of length 1 about topics."""
        inner = self.centres[topics] + 0.7 * self.random.standard_normal((len(topics), RANK))
        found = inner @ self.basis + 0.25 * self.random.standard_normal((len(topics), DIMENSIONS))
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def words(self, topic: int) -> list[str]:
        """The words of a text about a topic."""
        count = int(self.random.integers(6, 30))
        common = np.searchsorted(self.cumulated, self.random.random(count))
        own = self.random.choice(self.topic_words[topic], 4)
        return [WORDS[int(n)] for n in (*common, *own)]

    def frequent(self, count: int) -> list[str]:
        """Frequent words."""
        return [WORDS[int(n)] for n in np.searchsorted(self.cumulated, 0.5 * self.random.random(count))]


def _word_table() -> list[str]:
    """Distinct words of five letters."""
    found = []
    for number in range(VOCABULARY):
        mixed, letters = (number * 7_368_787) % 11_881_376, []
        for _ in range(5):
            mixed, letter = divmod(mixed, 26)
            letters.append(chr(97 + letter))
        found.append("".join(letters))
    return found


WORDS = _word_table()


@contextmanager
def database_in(folder: Path) -> Iterator[Database]:
    """An embedded Postgres of this benchmark's own."""
    with (
        embedded.DataDirectory(folder, now=datetime.now(UTC), command="benchmark") as held,
        embedded.started(held) as servers,
    ):
        assert servers.postgres is not None
        database = Database(servers.postgres.url, pool_size=2)
        database.upgrade()
        yield database
        database.close()


def load(database: Database, synthetic: Synthetic, count: int) -> Vectors:
    """Write so many passages with their vectors, and return the vectors."""
    with database.work() as work:
        work.run(text("TRUNCATE passage, passage_vector, passage_pending, recall_model RESTART IDENTITY CASCADE"))
        work.run(
            text(
                "INSERT INTO recall_model (name, state, dimensions, made, ready_at) "
                "VALUES (:name, 'ready', :dimensions, :made, now())"
            ),
            {"name": MODEL, "dimensions": DIMENSIONS, "made": count},
        )
        # Without its indexes: the rows come at once.
        work.run(text("DROP INDEX IF EXISTS ix_passage_lexemes, ix_passage_vector_1"))
    all_vectors = np.empty((count, DIMENSIONS), np.float16)
    bounds = [(name, int(count * share)) for name, share in USERS.items()]
    with psycopg.connect(database.conninfo(), autocommit=True) as connection:
        for first in range(0, count, CHUNK):
            end = min(count, first + CHUNK)
            topics = synthetic.random.integers(0, TOPICS, end - first)
            vectors = synthetic.vectors(topics).astype(np.float16)
            all_vectors[first:end] = vectors
            rows = io.StringIO()
            for number in range(first, end):
                user, low = "rest", 0
                for name, most in bounds:
                    if low <= number * 7919 % count < low + most:
                        user = name
                    low += most
                passage = NewPassage(
                    NAMESPACE, SourceKind.MESSAGE, f"msg_{number}",
                    " ".join(synthetic.words(int(topics[number - first]))),
                    user, f"conv_{number // 40}", number % 40,
                )  # fmt: skip
                lexemes, length = lexemes_of(passage, passage.text)
                at = START + timedelta(seconds=30 * number)
                values = (
                    *(number + 1, NAMESPACE, user, passage.conversation, "message", passage.source_id, 0),
                    *(
                        passage.conversation,
                        passage.position << 20,
                        passage.text,
                        "user",
                        at.isoformat(),
                        length,
                        lexemes,
                    ),
                )
                rows.write("\t".join(map(str, values)) + "\n")
            with connection.cursor() as cursor:
                columns = (
                    "id, namespace, owner, conversation, source, source_id, part, thread, place, text, role, at, "
                    "length, lexemes"
                )
                with cursor.copy(f"COPY passage ({columns}) FROM STDIN") as copy:
                    copy.write(rows.getvalue())
                with cursor.copy(
                    "COPY passage_vector (passage_id, model_id, vector) FROM STDIN (FORMAT binary)"
                ) as copy:
                    copy.write(_binary(first + 1, vectors))
    return all_vectors


def _binary(first: int, vectors: Vectors) -> bytes:
    """Rows of `passage_vector` in Postgres' binary format."""
    size = 2 * DIMENSIONS
    row = np.dtype(
        [
            ("fields", ">i2"),
            *(("id_size", ">i4"), ("id", ">i8"), ("model_size", ">i4"), ("model", ">i4")),
            *(("vector_size", ">i4"), ("dimensions", ">i2"), ("unused", ">i2"), ("vector", ">f2", (DIMENSIONS,))),
        ]
    )
    rows = np.zeros(len(vectors), row)
    rows["fields"], rows["id_size"], rows["model_size"], rows["model"] = 3, 8, 4, 1
    rows["id"] = np.arange(first, first + len(vectors))
    rows["vector_size"], rows["dimensions"], rows["vector"] = size + 4, DIMENSIONS, vectors
    return b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0) + rows.tobytes() + struct.pack(">h", -1)


def nearest(vectors: Vectors, queries: npt.NDArray[Any], count: int) -> list[set[int]]:
    """The ids of the nearest vectors of each query, exactly."""
    best = np.full((len(queries), count), -2.0, np.float32)
    ids = np.zeros((len(queries), count), np.int64)
    for first in range(0, len(vectors), 50_000):
        part = queries.astype(np.float32) @ vectors[first : first + 50_000].astype(np.float32).T
        scores = np.concatenate([best, part], axis=1)
        numbers = np.concatenate(
            [ids, np.broadcast_to(np.arange(first, first + part.shape[1]) + 1, part.shape)], axis=1
        )
        top = np.argpartition(-scores, count, axis=1)[:, :count]
        best, ids = np.take_along_axis(scores, top, 1), np.take_along_axis(numbers, top, 1)
    return [set(map(int, row)) for row in ids]


class _GivenVectors:
    """The vector of the next query."""

    vector: tuple[float, ...] = ()

    def __call__(self, _: str, __: Sequence[str], /) -> QueryVectors:
        return QueryVectors({MODEL: self.vector})

    def take_note(self, _: str, /) -> bool:
        """No query goes without its vector."""
        return False

    def close(self) -> None:
        """There is nothing to close."""


def measure(database: Database, synthetic: Synthetic, vectors: Vectors, rounds: int) -> dict[str, Any]:
    """The times and the recall of queries."""
    numbers = synthetic.random.integers(0, len(vectors), rounds)
    noise = 0.35 * synthetic.random.standard_normal((rounds, DIMENSIONS)) / np.sqrt(DIMENSIONS)
    queries = vectors[numbers].astype(np.float64) + noise
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    with database.work() as work:
        rows = work.rows(
            text("SELECT id, text FROM passage WHERE id = ANY(:ids)"), {"ids": [int(n) + 1 for n in numbers]}
        )
    texts = {row.id: row.text.split() for row in rows}
    said = []
    for number in numbers:
        own = texts[int(number) + 1]
        said.append(" ".join([*synthetic.random.choice(own[-4:], 2), *synthetic.frequent(3)]))
    given = _GivenVectors()
    recall = Recall(database, given)
    exact = nearest(vectors, queries, 10)
    figures: dict[str, Any] = {}
    middle = START + timedelta(seconds=30 * len(vectors) * 0.9)
    cases: dict[str, dict[str, Any]] = {
        "hybrid": {"scope": RecallScope.ALL},
        "dense": {"scope": RecallScope.ALL, "mode": RecallMode.DENSE, "neighbours": False},
        "lexical": {"scope": RecallScope.ALL, "mode": RecallMode.LEXICAL},
        "hybrid, last tenth of time": {"scope": RecallScope.ALL, "since": middle},
        **{f"hybrid, user with {share:.1%}": {"user": name} for name, share in USERS.items()},
    }
    for case, more in cases.items():
        times, hits, found_own = [], 0, 0
        methods: dict[str, int] = {}
        for index in range(-5, rounds):
            given.vector = tuple(queries[index].tolist())
            query = RecallQuery(said[index], NAMESPACE, limit=10, **more)
            began = time.perf_counter()
            answer = recall.search(query)
            if index < 0:
                continue
            times.append(time.perf_counter() - began)
            ids = {one.id for one in answer.passages}
            hits += len(ids & exact[index])
            found_own += int(numbers[index]) + 1 in ids
            how = f"{answer.lexical.method}/{answer.dense.method}"
            methods[how] = methods.get(how, 0) + 1
        times.sort()
        figures[case] = {
            "p50_ms": round(1000 * statistics.median(times), 1),
            "p95_ms": round(1000 * times[int(0.95 * (rounds - 1))], 1),
            "methods": methods,
        }
        if case == "dense":
            figures[case]["recall_at_10_of_index"] = round(hits / (10 * rounds), 4)
        if "user" not in more and "since" not in more:
            figures[case]["finds_its_passage"] = round(found_own / rounds, 3)
    return figures


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10000,100000,1000000")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="for the data of Postgres: 5 GB at 10^6")
    parser.add_argument("--keep", action="store_true", help="wait for a line of input before Postgres is stopped")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    log.configure(LogSettings(level="warning"))
    console = Console()
    results: dict[str, Any] = {"cores": os.cpu_count(), "machine": platform.machine(), "sizes": {}}
    with (
        tempfile.TemporaryDirectory(dir=options.folder, prefix="recall-scale-") as folder,
        database_in(Path(folder)) as database,
    ):
        for size in map(int, options.sizes.split(",")):
            synthetic = Synthetic(options.seed)
            began = time.perf_counter()
            vectors = load(database, synthetic, size)
            loaded = time.perf_counter()
            with database.session() as connection:
                connection.execute(text("SET maintenance_work_mem = '512MB'"))
                connection.execute(
                    text(
                        "CREATE INDEX ix_passage_lexemes ON passage USING gin (lexemes) "
                        "WITH (gin_pending_list_limit = 1024)"
                    )
                )
                connection.execute(text("RESET maintenance_work_mem"))
                words_indexed = time.perf_counter()
            if size >= vector_index.INDEXED_FROM:
                vector_index.create(database, 1, DIMENSIONS, size)
                with database.work() as work:
                    work.run(text("UPDATE recall_model SET is_indexed = true"))
            vectors_indexed = time.perf_counter()
            with database.session() as connection:
                connection.execute(text("VACUUM (ANALYZE) passage"))
                connection.execute(text("VACUUM (ANALYZE) passage_vector"))
                sizes = connection.execute(
                    text(
                        "SELECT relname, pg_relation_size(oid) >> 20 AS mib FROM pg_class "
                        "WHERE relname LIKE '%passage%' AND relkind IN ('r', 'i') AND pg_relation_size(oid) > 1048576"
                    )
                )
                figures: dict[str, Any] = {
                    "seconds": {
                        "load": round(loaded - began, 1),
                        "index of words": round(words_indexed - loaded, 1),
                        "index of vectors": round(vectors_indexed - words_indexed, 1),
                        "vacuum, analyze": round(time.perf_counter() - vectors_indexed, 1),
                    },
                    "mib": {row.relname: row.mib for row in sizes},
                }
            figures["queries"] = measure(database, synthetic, vectors, options.rounds)
            results["sizes"][size] = figures
            table = Table("query", "p50 ms", "p95 ms", "how", "recall@10 of the index", title=f"{size:,} passages")
            for case, of in figures["queries"].items():
                table.add_row(
                    case, *(str(of.get(k, "")) for k in ("p50_ms", "p95_ms", "methods", "recall_at_10_of_index"))
                )
            console.print(table)
            console.print(figures["seconds"], figures["mib"])
            if options.json:
                options.json.write_text(json.dumps(results, indent=2) + "\n")
            if options.keep:
                console.print(database.conninfo())
                input()


if __name__ == "__main__":
    main()

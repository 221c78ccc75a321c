"""What the jobs of batches and files read does not grow with the batches, files and runs that are kept."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import text

from app.catalog import files
from app.files import storage
from app.inference.batches.advance import Batches
from app.kernel.database import Database
from app.kernel.settings import Settings
from app.workflows.runs.service import Runs
from tests.growth import analyze, keep_ended, rows_read

#: How many batches and files are kept, first and then; and how many more rows may be read for that.
FEW, MANY, MORE = 500, 5_000, 100
BATCHES = text("""
    INSERT INTO batch (id, namespace, state, endpoint, input_file_id, completion_window, total, completed, failed,
                       created_at, expires_at, completed_at)
    SELECT gen_random_uuid(), 'default', 'completed', '/v1/chat/completions', gen_random_uuid(), '24h', 1, 1, 0,
           now() - interval '2 days', now() - interval '1 day', now() - interval '2 days'
    FROM generate_series(1, :count)
""")
FILES = text("""
    INSERT INTO file (id, namespace, filename, purpose, bytes, sha256, expires_at)
    SELECT gen_random_uuid(), 'default', 'kept', 'batch', 1, 'x', now() + interval '20 days'
    FROM generate_series(1, :count)
""")


@pytest.fixture
def own(database: Database) -> Iterator[Database]:
    """With one connection, whose counters are complete."""
    made = Database(database.url, pool_size=1)
    yield made
    made.close()


def test_the_jobs_read_only_what_is_due(own: Database, runs: Runs) -> None:
    settings, catalog = Settings(), files.read_catalog()
    service = Runs(own, runs.publisher, runs.policy)
    batches = Batches(service, lambda: catalog, settings.files, settings.batches, "control@here/1/x")

    def keep(count: int) -> None:
        with own.work() as work:
            work.run(BATCHES, {"count": count})
            work.run(FILES, {"count": count})
        keep_ended(own, count)
        analyze(own)

    def read() -> tuple[int, int]:
        for _ in range(2):  # the first fills the caches of the connection
            found = rows_read(own, batches.advance_all), rows_read(own, lambda: storage.remove_expired(own))
        return found

    keep(FEW)
    before = read()
    keep(MANY)
    after = read()
    assert all(many - few < MORE for few, many in zip(before, after, strict=True)), (before, after)

"""Migrations only add, or raise the floor of the schema; the schema is upgraded under running work."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from app.kernel import shipped
from app.kernel.database import Database
from app.kernel.embedded import start_postgres
from app.kernel.postgres import schema_floor

#: The revision with which the rule begins.
FIRST = "0035"
#: The schema before the rule.
BEFORE = "0031"


def migrations() -> Iterator[tuple[str, str]]:
    """The migrations after the first one with a floor, by the order of their revisions, with their sources."""
    parents = {}
    sources = {}
    for file in sorted(Path(shipped.folder("alembic") / "versions").glob("*.py")):
        source = file.read_text()
        named = re.search(r'^revision = "(\w+)"', source, re.MULTILINE)
        above = re.search(r'^down_revision = "(\w+)"', source, re.MULTILINE)
        assert named, file
        sources[named[1]] = source
        if above:
            parents[above[1]] = named[1]
    revision: str | None = FIRST
    while (revision := parents.get(revision or "")) is not None:
        yield revision, sources[revision]


def test_what_takes_something_away_raises_the_floor() -> None:
    wrong = {
        revision: found
        for revision, source in migrations()
        if (found := schema_floor.contractions(source)) and not schema_floor.RAISES.search(source)
    }
    assert wrong == {}, "see docs/many-hosts.md#rolling-upgrades"


@pytest.mark.parametrize(
    "statement",
    [
        'op.drop_table("run")',
        'op.drop_column("run", "labels")',
        'op.rename_table("run", "execution")',
        'op.alter_column("run", "state", new_column_name="phase")',
        'op.alter_column("run", "rank", type_=sa.Text())',
        'op.alter_column("run", "rank", nullable=False)',
        'op.add_column("run", sa.Column("owner", sa.Text(), nullable=False))',
        'op.create_check_constraint("x", "run", "rank > 0")',
        'op.create_unique_constraint("x", "run", ["rank"])',
        'op.create_index("x", "run", ["rank"], unique=True)',
        'op.execute("ALTER TABLE run RENAME COLUMN state TO phase")',
        'op.execute("alter table run drop column state")',
        'op.execute("ALTER TABLE run ALTER COLUMN rank SET NOT NULL")',
    ],
)
def test_contractions_are_found(statement: str) -> None:
    assert schema_floor.contractions(f"def upgrade():\n    {statement}\n")
    assert not schema_floor.contractions(f"def downgrade():\n    {statement}\n")


@pytest.mark.parametrize(
    "statement",
    [
        'op.create_table("other", sa.Column("id", sa.Integer(), nullable=False))',
        'op.add_column("run", sa.Column("owner", sa.Text()))',
        'op.add_column("run", sa.Column("owner", sa.Text(), nullable=False, server_default=""))',
        'op.alter_column("run", "owner", nullable=True)',
        'op.create_index("x", "run", ["rank"])',
        'op.execute("UPDATE run SET rank = 1")',
    ],
)
def test_what_only_adds_is_no_contraction(statement: str) -> None:
    assert schema_floor.contractions(f"def upgrade():\n    {statement}\n") == []
    created = 'def upgrade():\n    op.create_table("other")\n    op.create_index("x", "other", ["y"], unique=True)\n'
    assert schema_floor.contractions(created) == []


@pytest.mark.storm
@pytest.mark.slow
def test_a_schema_with_100_000_runs_is_upgraded_under_work(tmp_path: Path) -> None:
    """Programs of before read and write meanwhile; none of their statements fails, and nothing is lost."""
    server = start_postgres(tmp_path / "postgres")
    database = Database(server.url, pool_size=4)
    try:
        database.upgrade(BEFORE)
        with database.work() as work:
            work.execute(text("INSERT INTO definition (sha256, document) VALUES (repeat('a', 64), '{}')"))
            work.execute(
                text("""
                INSERT INTO run (id, namespace, workflow, version, sha256, state, priority, rank, labels, inputs,
                                 request_sha256, depth, retention_s, paused, workflow_paused, finished_at)
                SELECT gen_random_uuid(), 'default', 'flow', 1, repeat('a', 64), 'succeeded', 'standard', 1, '{}', '{}',
                       repeat('b', 64), 0, 86400, false, false, now()
                FROM generate_series(1, 100000)
            """)
            )
        stopped = threading.Event()
        waits: list[float] = []
        failed: list[Exception] = []

        def write() -> None:
            while not stopped.is_set():
                begun = time.monotonic()
                try:
                    with database.work() as work:
                        work.run(
                            text("""
                            UPDATE run SET labels = '{"seen": "yes"}'
                            WHERE id IN (SELECT id FROM run WHERE labels = '{}' LIMIT 20 FOR UPDATE SKIP LOCKED)
                        """)
                        )
                        work.rows(text("SELECT name FROM host FOR UPDATE"))
                        work.rows(text("SELECT id FROM reservation LIMIT 1"))
                except Exception as error:  # noqa: BLE001 the test reports it
                    failed.append(error)
                    return
                waits.append(time.monotonic() - begun)

        writers = [threading.Thread(target=write) for _ in range(2)]
        for writer in writers:
            writer.start()
        begun = time.monotonic()
        database.upgrade()
        took = time.monotonic() - begun
        stopped.set()
        for writer in writers:
            writer.join()
        assert failed == []
        assert waits
        with database.work() as work:
            assert work.rows(text("SELECT count(*) AS n FROM run"))[0].n == 100_000
        database.require_head()
        print(f"upgraded in {took:.2f} s; {len(waits)} transactions beside it, the longest {max(waits):.2f} s")  # noqa: T201 the figure
    finally:
        database.close()
        server.stop()

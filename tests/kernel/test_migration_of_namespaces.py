"""Migration 0009: existing runs, workflows, pauses and schedules get their namespace."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import text

from app.kernel.database import Database

BEFORE = """
    INSERT INTO definition (sha256, document) VALUES ('d1', '{"workflow": "flow"}'), ('d2', '{"workflow": "other"}');
    INSERT INTO workflow (name, version, sha256) VALUES ('flow', 1, 'd1'), ('flow', 2, 'd1'), ('other', 1, 'd2');
    INSERT INTO workflow_pause (name) VALUES ('flow');
    INSERT INTO run (id, workflow, version, sha256, state, paused, workflow_paused, priority, rank, inputs, depth,
                     labels, idempotency_key, concurrency_key, retention_s)
    SELECT gen_random_uuid(), 'flow', 1, 'd1', 'queued', false, true, 'standard', 1, '{}', 0,
           labels::jsonb, key, 'flow/x', 1
    FROM (VALUES ('{"namespace": "a"}', 'k1'), ('{}', 'k2'), ('{"namespace": "Not Valid"}', 'k3'))
         AS given (labels, key);
    INSERT INTO schedule (id, name, document, decided_to) VALUES
        (gen_random_uuid(), 's1', '{"workflow": "other", "labels": {"namespace": "b"}}', now()),
        (gen_random_uuid(), 's2', '{"workflow": "flow", "labels": {}}', now());
"""


@pytest.fixture
def at_0008(database_url: str) -> Iterator[Database]:
    """A database at revision 0008 with rows."""
    admin = Database(database_url, pool_size=1)
    with admin.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("DROP DATABASE IF EXISTS before_namespaces WITH (FORCE)"))
        connection.execute(text("CREATE DATABASE before_namespaces"))
    made = Database(database_url.rpartition("/")[0] + "/before_namespaces", pool_size=2)
    made.upgrade("0008")
    with made.schema() as connection:
        for statement in BEFORE.split(";\n"):
            connection.exec_driver_sql(statement)
    yield made
    made.close()
    admin.close()


def test_rows_keep_the_namespace_of_their_label(at_0008: Database) -> None:
    at_0008.upgrade("0009")

    def found(statement: str) -> set[tuple[str, ...]]:
        with at_0008.work() as work:
            return {tuple(row) for row in work.rows(text(statement))}

    assert found("SELECT idempotency_key, namespace, concurrency_key FROM run") == {
        ("k1", "a", "a:flow/x"),
        ("k2", "default", "flow/x"),
        ("k3", "default", "flow/x"),
    }
    assert found("SELECT name, namespace FROM schedule") == {("s1", "b"), ("s2", "default")}
    # A namespace that uses a workflow of before has it still.
    assert found("SELECT namespace, name, version::text FROM workflow WHERE namespace <> 'default'") == {
        ("a", "flow", "1"),
        ("a", "flow", "2"),
        ("b", "other", "1"),
    }
    assert found("SELECT namespace, name FROM workflow_pause") == {("default", "flow"), ("a", "flow")}

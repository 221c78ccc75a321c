"""A database with rows of many kinds, and empty ones beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy.engine import make_url

from app.backup import tables
from app.kernel import ids
from app.kernel.database import Database
from app.workflows.language import check
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission

#: What COPY has to escape, what JSON and Postgres treat differently, and long enough for a payload of its own.
ODD = "a\\.\n\\N\t\\\\.\r\n\u2028 é 🦙 " + "\\.\n" * 3000

_ROWS = """
    INSERT INTO host (name, state, identity, agent_epoch, agent_until, joined_at, cores, files, problems)
    VALUES ('h', 'schedulable', 'elsewhere', 7, now() + interval '1 hour', now(), 1, '[]', '[]');
    INSERT INTO device (id, host, name, kind, type, uuid, simulated, present, speed, total_bytes, capacity_bytes,
                        charged_bytes, non_preemptible_bytes, used_bytes, unmanaged_bytes)
    VALUES ('h/cpu', 'h', 'cpu', 'ram', 'cpu', '', false, true, 0.1, 100, 100, 60, 0, 0, 0);
    INSERT INTO reservation (id, epoch, revision, state, host, configuration, draining, pinned, namespace, lease_until)
    VALUES ('01890000-0000-7000-8000-000000000001', nextval('fleet_epoch'), 0, 'active', 'h', 'c', false, false, '',
            now() + interval '1 hour');
    INSERT INTO reservation_device (reservation_id, device_id, bytes)
    VALUES ('01890000-0000-7000-8000-000000000001', 'h/cpu', 60);
    INSERT INTO file (id, namespace, filename, purpose, bytes)
    VALUES ('01890000-0000-7000-8000-000000000002', 'default', E'a\\tb', 'batch', 7);
    INSERT INTO file_chunk (file_id, number, data)
    VALUES ('01890000-0000-7000-8000-000000000002', 0, '\\x000a0d5c2e0aff');
    INSERT INTO recall_model (name, state, dimensions, is_indexed) VALUES ('m@abc', 'ready', 3, true);
    INSERT INTO passage (namespace, owner, source, source_id, part, thread, place, text, length, lexemes)
    VALUES ('default', '', 'message', '1', 0, 't', 1, 'bees fly', 2, to_tsvector('simple', 'bees fly'));
    INSERT INTO passage_vector (passage_id, model_id, vector)
    SELECT passage.id, recall_model.id, '[0.1,-2.5,3e-5]'::halfvec FROM passage, recall_model;
    INSERT INTO payload (sha256, bytes, body) VALUES (repeat('a', 64), 9, E'\\\\.\n\\\\N\t{"a": 1}')
"""


@pytest.fixture
def filled(database: Database, runs: Runs) -> Database:
    """Two runs, one with a large odd input; a host with a reservation; a file of bytes; a passage with its vector."""
    noop = {"workflow": "one", "inputs": {"t": {"type": "string"}}, "steps": [{"id": "a", "kind": "noop"}]}
    definition = check.parse(json.dumps(noop))
    for value in ("x", ODD):
        runs.submit(Submission(definition, {"t": value}))
    with psycopg.connect(database.conninfo()) as connection:
        connection.execute(_ROWS.encode())
    return database


@pytest.fixture
def new_database(database_url: str) -> Iterator[Callable[[], Database]]:
    """Makes empty databases beside that of the session."""
    made: list[Database] = []
    admin = make_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)

    def make() -> Database:
        name = f"empty_{ids.new_text(8, lower_case=True)}"
        with psycopg.connect(admin, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        found = Database(make_url(database_url).set(database=name).render_as_string(hide_password=False), pool_size=2)
        made.append(found)
        return found

    yield make
    with psycopg.connect(admin, autocommit=True) as connection:
        for one in made:
            one.close()
            connection.execute(f'DROP DATABASE "{make_url(one.url).database}" WITH (FORCE)'.encode())


def content_of(database: Database) -> dict[str, Any]:
    """A digest of the rows of each table, and the values of sequences."""
    with psycopg.connect(database.conninfo(), autocommit=True) as connection:
        found: dict[str, Any] = {}
        for name, columns in tables.read_schema(connection).items():
            with connection.cursor().copy(tables.copy_out(name, columns)) as rows:
                lines = sorted(bytes(row) for row in rows)
            found[name] = (len(lines), hashlib.sha256(b"".join(lines)).hexdigest())
        found["sequences"] = tables.read_sequences(connection)
        return found

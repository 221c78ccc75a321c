"""
The vectors of passages: which are missing, and storing them.

New passages are in a queue, which the transaction that wrote them has filled. A model that is new gets vectors of all
older passages too, in the order of their ids; how far it has come is stored with each batch. A batch is one
transaction, so a process that dies loses the vectors of one batch, which are made again.

A model is known by its name in the catalogue and the hash of its file, which stand together in the column `name`:
another file makes other vectors. Of one name at most one model is not retired.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.kernel.database import Database, UnitOfWork
from app.memory.recall.dense import literal

_COLUMNS = """
    id, split_part(name, '@', 1) AS name, NULLIF(split_part(name, '@', 2), '') AS file, state, dimensions, reached,
    made, is_indexed, run_id, problem, created_at, ready_at
"""
_ALL = text(f"SELECT {_COLUMNS} FROM recall_model ORDER BY state = 'retired', id DESC")
_FIND = text(f"""
    SELECT {_COLUMNS} FROM recall_model WHERE split_part(name, '@', 1) = :name
    ORDER BY state = 'retired', id DESC LIMIT 1
""")
_FIND_BY_ID = text(f"SELECT {_COLUMNS} FROM recall_model WHERE id = :id")
_LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended('recall_model', 0))")
# A model that is configured again before its old vectors were removed keeps those that are left.
_ENSURE = text(f"""
    INSERT INTO recall_model (name, state) VALUES (:name, 'building')
    ON CONFLICT (name) DO UPDATE
        SET state = CASE WHEN recall_model.state = 'retired' THEN 'building' ELSE recall_model.state END,
            reached = CASE WHEN recall_model.state = 'retired' THEN 0 ELSE recall_model.reached END
    RETURNING {_COLUMNS}
""")
_QUEUED = text("""
    SELECT passage.id, passage.text, passage.speaker FROM passage_pending
    JOIN passage ON passage.id = passage_pending.passage_id
    WHERE passage_pending.problem IS NULL ORDER BY passage_pending.passage_id LIMIT :most
""")
_OLDER = text("""
    SELECT passage.id, passage.text, passage.speaker FROM passage
    WHERE passage.id > :reached
      AND NOT EXISTS (SELECT FROM passage_vector WHERE passage_id = passage.id AND model_id = :model)
      AND NOT EXISTS (SELECT FROM passage_pending WHERE passage_id = passage.id)
    ORDER BY passage.id LIMIT :most
""")
# A passage that was removed meanwhile is not there any more; one that is, stays until the commit.
_STORE = text("""
    WITH there AS MATERIALIZED (
        SELECT passage.id, given.vector
        FROM jsonb_to_recordset(CAST(:vectors AS jsonb)) AS given(id bigint, vector text)
        JOIN passage ON passage.id = given.id FOR KEY SHARE OF passage
    ), done AS (
        DELETE FROM passage_pending WHERE passage_id = ANY(:ids)
    ), stored AS (
        INSERT INTO passage_vector (passage_id, model_id, vector)
        SELECT id, :model, CAST(vector AS halfvec) FROM there
        ON CONFLICT (passage_id, model_id) DO UPDATE SET vector = excluded.vector
        RETURNING passage_id
    )
    UPDATE recall_model SET dimensions = :dimensions, made = made + (SELECT count(*) FROM stored),
           reached = greatest(reached, CAST(:reached AS bigint)), problem = NULL
    WHERE id = :model
""")
_REFUSE = text("""
    INSERT INTO passage_pending (passage_id, problem) SELECT id, :problem FROM passage WHERE id = :id
    ON CONFLICT (passage_id) DO UPDATE SET problem = excluded.problem
""")
_RETRY = text("UPDATE passage_pending SET problem = NULL WHERE problem IS NOT NULL")
_READY = text("""
    WITH others AS (
        UPDATE recall_model SET state = 'retired', reached = 0, run_id = NULL WHERE id <> :model AND state <> 'retired'
    )
    UPDATE recall_model SET state = 'ready', ready_at = now() WHERE id = :model AND state = 'building'
""")
_REMOVE = text("""
    WITH old AS (
        SELECT passage_id FROM passage_vector WHERE model_id = :model AND passage_id > :reached
        ORDER BY passage_id LIMIT :most
    ), gone AS (
        DELETE FROM passage_vector USING old
        WHERE passage_vector.passage_id = old.passage_id AND passage_vector.model_id = :model
    ), moved AS (
        UPDATE recall_model SET reached = COALESCE((SELECT max(passage_id) FROM old), reached) WHERE id = :model
    )
    SELECT count(*) AS count FROM old
""")
_ADOPT = text("UPDATE recall_model SET name = :name WHERE id = :model")
_RETIRE = text("UPDATE recall_model SET state = 'retired', reached = 0, run_id = NULL WHERE id = :model")
_CONTINUE = text("UPDATE recall_model SET run_id = :run_id WHERE id = :model")
_FORGET = text("DELETE FROM recall_model WHERE id = :model AND state = 'retired'")
_SET = text("UPDATE recall_model SET run_id = :run_id, problem = :problem WHERE id = :model")
_INDEXED = text("UPDATE recall_model SET is_indexed = :is_indexed WHERE id = :model")
_WAITING = text("SELECT EXISTS (SELECT FROM passage_pending WHERE problem IS NULL) AS waiting")
_RUN = text(
    "SELECT state, error, finished_at, finished_at < now() - interval '1 minute' AS is_old FROM run WHERE id = :id"
)


@dataclass(frozen=True, slots=True)
class RecallModel:
    """An embedding model, and how far it has come. Its fields are those of `RecallModelRow`."""

    id: int
    name: str
    #: The beginning of the hash of its file; None if no pool has told it yet, or it has no file.
    file: str | None
    state: str
    dimensions: int | None
    reached: int
    made: int
    is_indexed: bool
    run_id: UUID | None
    problem: str | None
    created_at: datetime
    ready_at: datetime | None


@dataclass(frozen=True, slots=True)
class MissingVector:
    """A passage without a vector."""

    id: int
    text: str
    speaker: str | None


@dataclass(frozen=True, slots=True)
class MissingVectors:
    """A batch of passages without vectors."""

    passages: Sequence[MissingVector]
    #: They are older than the model: none up to the last of them lacks a vector then.
    are_older: bool = False


def all_models(work: UnitOfWork) -> list[RecallModel]:
    """Return all embedding models: those that are not retired first, of these the newest."""
    return work.rows_of(RecallModel, _ALL)


def find_model(database: Database, name: str) -> RecallModel | None:
    """Return the embedding model of that name in the catalogue, and of its present file."""
    with database.work() as work:
        return work.row_of(RecallModel, _FIND, {"name": name})


def reread(database: Database, model: RecallModel) -> RecallModel | None:
    """Return an embedding model as it is now; None when it was removed."""
    with database.work() as work:
        return work.row_of(RecallModel, _FIND_BY_ID, {"id": model.id})


def ensure_model(work: UnitOfWork, name: str) -> RecallModel:
    """Return the model, new or wanted again."""
    work.execute(_LOCK)
    known = work.row_of(RecallModel, _FIND, {"name": name})
    return _ensure(work, name if known is None else _stored_name(name, known.file))


def note_file(database: Database, name: str, file: str) -> bool:
    """
    Store which file of a model a pool has loaded. Vectors of an earlier file count no more, and are made anew.

    Returns whether the file is another one than before. A model that recall does not use is passed over.
    """
    with database.work() as work:
        work.execute(_LOCK)
        known = work.row_of(RecallModel, _FIND, {"name": name})
        if known is None or known.state == "retired" or known.file == file:
            return False
        if known.file is None:
            work.execute(_ADOPT, {"model": known.id, "name": _stored_name(name, file)})
            return False
        work.execute(_RETIRE, {"model": known.id})
        made = _ensure(work, _stored_name(name, file))
        work.execute(_CONTINUE, {"model": made.id, "run_id": known.run_id})
        return True


def _stored_name(name: str, file: str | None) -> str:
    return name if file is None else f"{name}@{file}"


def _ensure(work: UnitOfWork, stored_name: str) -> RecallModel:
    found = work.row_of(RecallModel, _ENSURE, {"name": stored_name})
    assert found is not None, "it is there"
    if found.made == 0:
        work.execute(_RETRY)  # what another model could not embed, this one perhaps can
    return found


def missing(database: Database, model: RecallModel, most: int) -> MissingVectors:
    """Return passages that have no vector of a model: those of the queue first."""
    with database.work() as work:
        queued = work.rows_of(MissingVector, _QUEUED, {"most": most})
        if queued or model.state != "building":
            return MissingVectors(queued)
        values = {"reached": model.reached, "model": model.id, "most": most}
        return MissingVectors(work.rows_of(MissingVector, _OLDER, values), are_older=True)


def store(
    database: Database, model: RecallModel, batch: MissingVectors, vectors: Mapping[int, Sequence[float]]
) -> None:
    """Store the vectors of a batch by the ids of their passages. All have the same dimensions."""
    dimensions = len(next(iter(vectors.values())))
    given = [{"id": id_, "vector": literal(vector)} for id_, vector in vectors.items()]
    values: dict[str, Any] = {
        "vectors": json.dumps(given),
        "ids": list(vectors),
        "model": model.id,
        "dimensions": dimensions,
        "reached": max(one.id for one in batch.passages) if batch.are_older else 0,
    }
    with database.work() as work:
        work.run(_STORE, values)


def refuse(database: Database, passage_id: int, problem: str) -> None:
    """Note that no vector can be made of a passage."""
    with database.work() as work:
        work.run(_REFUSE, {"id": passage_id, "problem": problem})


def finish(database: Database, model: RecallModel) -> None:
    """Every passage has a vector of the model: those of others are not needed any more."""
    with database.work() as work:
        work.run(_READY, {"model": model.id})


def remove_some(database: Database, model: RecallModel, most: int) -> int:
    """Remove vectors of a retired model, and return how many."""
    with database.work() as work:
        row = work.row(_REMOVE, {"model": model.id, "reached": model.reached, "most": most})
        return int(row.count) if row is not None else 0


def forget_model(database: Database, model: RecallModel) -> None:
    """Remove a retired model that has no vectors left."""
    with database.work() as work:
        work.run(_FORGET, {"model": model.id})


def note(database: Database, model: RecallModel, run_id: UUID | None, problem: str | None) -> None:
    """Store which run makes vectors now, or why none does."""
    if (run_id, problem) != (model.run_id, model.problem):
        with database.work() as work:
            work.run(_SET, {"model": model.id, "run_id": run_id, "problem": problem})


def note_index(database: Database, model: RecallModel, *, is_indexed: bool) -> None:
    """Store whether a model has its index."""
    with database.work() as work:
        work.run(_INDEXED, {"model": model.id, "is_indexed": is_indexed})


def are_waiting(database: Database) -> bool:
    """Whether there are passages in the queue."""
    with database.work() as work:
        row = work.row(_WAITING)
        return row is not None and bool(row.waiting)


def state_of_run(database: Database, run_id: UUID) -> Any | None:
    """Return `state`, `error`, `finished_at` and `is_old` of a run; None when it is gone."""
    with database.work() as work:
        return work.row(_RUN, {"id": run_id})

"""
The HNSW index of the vectors of one model.

It is a partial index on the vectors of this model, as numbers of 16 bits: half the memory of 32 bits, for the same
results (benchmarks/README.md). Below some thousand passages comparing all is as fast, and exact, so it is made later.
"""

from __future__ import annotations

from sqlalchemy import text

from app.kernel.database import Database

#: Vectors of a model from which on it has an index.
INDEXED_FROM = 10_000
#: Links of a node, and candidates while it is linked.
_M, _EF_CONSTRUCTION = 16, 64
#: Bytes of a vector's node in memory besides its numbers, and the bounds of the memory for making the index.
_NODE_BYTES, _LEAST_MEMORY, _MOST_MEMORY = 450, 64 << 20, 2 << 30


def name_of(model_id: int) -> str:
    """Return the name of the index of a model."""
    return f"ix_passage_vector_{model_id}"


def create(database: Database, model_id: int, dimensions: int, vectors: int) -> None:
    """
    Make the index of a model, without holding up those who write. `vectors` is about how many there are.

    What a failed attempt has left is replaced. Raises DatabaseUnreachable.
    """
    memory = max(_LEAST_MEMORY, min(_MOST_MEMORY, vectors * (2 * dimensions + _NODE_BYTES) * 5 // 4))
    name = name_of(int(model_id))
    with database.session() as connection:
        connection.execute(text(f"SET maintenance_work_mem = {memory >> 10}"))
        try:
            connection.execute(text(f"DROP INDEX CONCURRENTLY IF EXISTS {name}"))
            connection.execute(
                text(
                    f"CREATE INDEX CONCURRENTLY {name} ON passage_vector USING hnsw "
                    f"((CAST(vector AS halfvec({int(dimensions)}))) halfvec_ip_ops) "
                    f"WITH (m = {_M}, ef_construction = {_EF_CONSTRUCTION}) WHERE model_id = {int(model_id)}"
                )
            )
        finally:
            connection.execute(text("RESET maintenance_work_mem"))


def drop(database: Database, model_id: int) -> None:
    """Remove the index of a model, if there is one."""
    with database.session() as connection:
        connection.execute(text(f"DROP INDEX CONCURRENTLY IF EXISTS {name_of(int(model_id))}"))

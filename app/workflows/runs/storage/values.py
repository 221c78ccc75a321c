"""Values: the inputs of a run and the outputs of its steps, as expressions and templates see them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.kernel.database import UnitOfWork
from app.kernel.errors import FailureReason, StepFailure
from app.workflows.runs.storage import payloads

_INPUTS = text("SELECT inputs, inputs_sha256 FROM run WHERE id = :id")
_OUTPUTS = text("""
    SELECT id, key, kind, state, output, output_sha256, output_bytes, finish_reason, error FROM step
    WHERE run_id = :id AND key = ANY(:keys)
""")
_ITEM_OUTPUTS = text("""
    SELECT output, output_sha256, output_bytes, finish_reason FROM step WHERE parent_id = :id ORDER BY item
""")


@dataclass(frozen=True, slots=True)
class _Inputs:
    inputs: dict[str, Any] | None
    inputs_sha256: str | None


@dataclass(frozen=True, slots=True)
class _Output:
    output: Any
    output_sha256: str | None
    output_bytes: int | None
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class _StepOutput(_Output):
    id: UUID
    key: str
    kind: str
    state: str
    error: dict[str, Any] | None


def inputs(work: UnitOfWork, run_id: UUID) -> dict[str, Any]:
    """The inputs of a run."""
    rows = payloads.filled(work, work.rows_of(_Inputs, _INPUTS, {"id": run_id}), "inputs")
    return (rows[0].inputs or {}) if rows else {}


def outputs(
    work: UnitOfWork, run_id: UUID, keys: Collection[str], max_bytes: int, succeeded: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """
    `state`, `output`, `error` and `finish_reason` of each of these steps. The output of a map is the list of its items'
    outputs, and its finish reason the list of theirs.

    `succeeded` names those that have succeeded in this transaction and are not written yet. Raises StepFailure when
    the outputs have more than `max_bytes` bytes together.
    """
    if not keys:
        return {}
    rows = work.rows_of(_StepOutput, _OUTPUTS, {"id": run_id, "keys": list(keys)})
    maps = {row.key: row.id for row in rows if row.kind == "map" and (row.state == "succeeded" or row.key in succeeded)}
    items = {key: work.rows_of(_Output, _ITEM_OUTPUTS, {"id": step_id}) for key, step_id in maps.items()}
    read_rows: list[_Output] = [*rows, *(row for part in items.values() for row in part)]
    size = sum(row.output_bytes or 0 for row in read_rows)
    if size > max_bytes:
        read = ", ".join(row.key for row in rows)
        message = f"the outputs that are read ({read}) have {size} bytes, more than runs.max_read_bytes ({max_bytes})"
        raise StepFailure(FailureReason.INVALID_REQUEST, message)
    found: dict[str, dict[str, Any]] = {}
    for row in payloads.filled(work, rows, "output"):
        output: Any = row.output
        finish_reason: Any = row.finish_reason
        if row.key in items:
            output = [item.output for item in payloads.filled(work, items[row.key], "output")]
            finish_reason = [item.finish_reason for item in items[row.key]]
        found[row.key] = {"state": row.state, "output": output, "error": row.error, "finish_reason": finish_reason}
    return found

"""The record of an agent, read from the database."""

from __future__ import annotations

from uuid import UUID

from app.kernel.database import Database
from app.workflows.runs.storage import agent_items
from app.workflows.runs.storage.agent_items import AgentItem
from app.workflows.state_machine.states import StepState
from workers.tool_loop.record import MAX_OUTPUT, Record, RecordedItem, cut


def read(database: Database, step_id: UUID, result_characters: int) -> Record:
    """Return the record of the agent with that step. Of outputs that are too long, the beginning is read."""
    with database.work() as work:
        rows = agent_items.read(work, step_id, MAX_OUTPUT)
        long = [row.item for row in rows if (row.output_bytes or 0) > MAX_OUTPUT]
        beginnings = {item: agent_items.beginning(work, step_id, item, result_characters + 1) for item in long}
    return Record([_item(row, beginnings.get(row.item), result_characters) for row in rows])


def _item(row: AgentItem, beginning: str | None, most: int) -> RecordedItem:
    output = row.output
    if beginning is not None:
        output = f"{cut(beginning, most)[:most]}\n[cut: the result has {row.output_bytes} bytes]"
    return RecordedItem(
        row.item,
        row.kind,
        StepState(row.state),
        row.input,
        output,
        row.error,
        row.tokens_in + row.tokens_out,
        row.cost or 0.0,
        row.ready_at,
        row.finished_at,
    )

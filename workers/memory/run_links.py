"""Notes that a run holds texts of conversations, so that whoever deletes one of them deletes the run."""

from __future__ import annotations

from collections.abc import Iterable
from uuid import UUID

from app.kernel.database import Database
from app.memory.conversations import store
from app.memory.conversations.service import parsed_conversation
from app.memory.recall.query import Recalled


def link(database: Database, run_id: UUID, conversations: Iterable[UUID | None]) -> None:
    """Note that a run holds texts of these conversations; those that are not there are passed over."""
    wanted = sorted({one for one in conversations if one is not None})
    if not wanted:
        return
    with database.work() as work:
        for one in wanted:  # in one order, so that two transactions do not wait for each other
            store.link_runs(work, one, {run_id})


def link_recalled(database: Database, run_id: UUID, recalled: Recalled) -> None:
    """Note that a run holds what was recalled."""
    link(database, run_id, (parsed_conversation(one.conversation) for one in recalled.passages if one.conversation))

"""
Messages about steps: a hint that one can be taken.

A message names a step and an attempt, and is sent once the transaction that made it true has committed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

from app.kernel.broker import Publisher, priority_of
from app.kernel.database import UnitOfWork

#: The task that workers listen for.
RUN_STEP = "workers.steps.run_step"


@dataclass(frozen=True, slots=True)
class StepMessage:
    """A step that is ready, for whoever works on its queue."""

    step_id: UUID
    attempt: int
    queue: str
    priority: str
    #: The place within the class of priority.
    rank: int
    #: Workflow and step, for people who watch the workers.
    name: str


def of(row: Any, workflow: str) -> StepMessage:
    """The message about a row: `id`, `attempt`, `queue`, `priority`, `rank`, `key`."""
    return StepMessage(row.id, row.attempt, row.queue, row.priority, row.rank, f"{workflow}/{row.key}")


def send(publisher: Publisher, message: StepMessage) -> None:
    """Send the message. If that fails, the sweep sends it again."""
    publisher.publish(
        RUN_STEP,
        (str(message.step_id), message.attempt),
        queue=message.queue,
        priority=priority_of(message.priority, message.rank),
        description=f"{message.name} #{message.attempt}",
    )


def send_after_commit(work: UnitOfWork, publisher: Publisher, message: StepMessage) -> None:
    """Send the message once the work has committed."""
    work.after_commit(partial(send, publisher, message))

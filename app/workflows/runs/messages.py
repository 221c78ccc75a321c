"""
Messages about steps: each is a hint that a step can be claimed.

A message names a step and an attempt. It is sent after the commit of the transaction that made the step ready.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from app.kernel.broker import Publisher, priority_of
from app.workflows.runs.storage.selected import ReadyStep

#: The task of workers that receives the messages.
RUN_STEP = "workers.steps.run_step"


@dataclass(frozen=True, slots=True)
class StepMessage:
    """A message to the workers of a queue: this step is ready."""

    step_id: UUID
    attempt: int
    queue: str
    priority: str
    #: The place within the class of priority.
    rank: int
    #: Workflow and step, for people who watch the workers.
    name: str

    @staticmethod
    def of(step: ReadyStep, workflow: str) -> StepMessage:
        """The message about a step of a run of that workflow."""
        return StepMessage(step.id, step.attempt, step.queue, step.priority, step.rank, f"{workflow}/{step.key}")


def send(publisher: Publisher, message: StepMessage) -> None:
    """Send the message. If that fails, the sweep sends it again."""
    publisher.publish(
        RUN_STEP,
        (str(message.step_id), message.attempt),
        queue=message.queue,
        priority=priority_of(message.priority, message.rank),
        description=f"{message.name} #{message.attempt}",
    )

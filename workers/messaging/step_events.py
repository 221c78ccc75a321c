"""
The events of steps: what Flower shows of them.

Each attempt that a worker has claimed is a task in Flower: its name is the workflow and the step, its keyword arguments
name the run, its state is the outcome of the attempt. Celery's own events could not say it: a message names only a step
and an attempt, a worker goes on with short steps without messages, and a failed attempt that is recorded is a task that
ended well.
Nothing is sent while no monitor listens. Prompts, inputs and outputs are never sent.
"""

from __future__ import annotations

from typing import Any

from app.kernel.broker import IO_QUEUE
from app.kernel.errors import shortened
from app.workflows.runs.claims import Claim
from app.workflows.state_machine.states import StepState

#: Most characters of the reason of a failure.
_REASON_CHARACTERS = 300

#: The event for the state in which a failed attempt leaves its step; any other state is a failure.
_ENDS = {
    StepState.READY: "task-retried",
    StepState.WAITING: "task-retried",
    StepState.CANCELLED: "task-revoked",
}


class StepEvents:
    """Sends the events of the steps of one worker, through the dispatcher of its consumer."""

    def __init__(self) -> None:
        self._consumer: Any = None

    def attach(self, consumer: Any) -> None:
        """Send through the consumer from now on."""
        self._consumer = consumer

    def started(self, claim: Claim) -> None:
        """An attempt was claimed and is executed now."""
        self._send("task-received", claim)
        self._send("task-started", claim)

    def succeeded(self, claim: Claim, result: str, seconds: float) -> None:
        """The attempt did its part. `result` says in a few words what came of it."""
        self._send("task-succeeded", claim, result=result, runtime=seconds)

    def failed(self, claim: Claim, state: StepState, reason: str, message: str) -> None:
        """The attempt failed, which left its step in this state: it is tried again, was cancelled, or has failed."""
        description = shortened(f"{reason}: {message}", _REASON_CHARACTERS)
        type_ = _ENDS.get(state, "task-failed")
        more = {"terminated": True, "signum": None, "expired": False} if type_ == "task-revoked" else {}
        self._send(type_, claim, exception=description, traceback="", **more)

    def lost(self, claim: Claim) -> None:
        """The attempt lost its lease; what follows is decided elsewhere."""
        self.failed(claim, StepState.FAILED, "lease_lost", "its lease ended before it did; its result was dropped")

    def _send(self, type_: str, claim: Claim, **fields: Any) -> None:
        """Send an event; the dispatcher sends nothing while nobody listens, and keeps it while the broker is away."""
        dispatcher = None if self._consumer is None else self._consumer.event_dispatcher
        if dispatcher is None or not dispatcher.enabled:
            return
        about = {"run": str(claim.run_id), "step": claim.key, "attempt": claim.attempt}
        if claim.model is not None:
            about["model"] = claim.model
        # Each event says what it is about: a monitor may have begun to listen, or have been restarted, since the first.
        dispatcher.send(
            type_,
            uuid=f"{claim.step_id}-{claim.attempt}",
            name=f"{claim.workflow}/{claim.key.partition('[')[0]}",
            args="()",
            kwargs=repr(about),
            retries=claim.attempt - 1,
            routing_key=claim.model or IO_QUEUE,
            **fields,
        )

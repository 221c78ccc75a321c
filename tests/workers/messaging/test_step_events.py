"""The events of steps: what a monitor learns that begins to listen in the middle, and when nobody does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

from celery.events.state import State

from app.workflows.runs.claims import Claim
from app.workflows.state_machine.states import StepState
from workers.messaging.step_events import StepEvents

CLAIM = Claim(UUID(int=1), UUID(int=2), "judge[7]", 3, "standard", cast(Any, None), {}, "m:1b", workflow="reviews")


class Monitor:
    """Celery's own state of a monitor, which hears the events as they are sent."""

    def __init__(self) -> None:
        self.enabled, self.state, self._clock = True, State(), 0

    def send(self, type_: str, **fields: Any) -> None:
        self._clock += 1
        at = {"timestamp": self._clock, "local_received": self._clock, "utcoffset": 0, "pid": 1, "clock": self._clock}
        self.state.event({"type": type_, "hostname": "w@h", **at, **fields})

    @property
    def task(self) -> Any:
        (task,) = self.state.tasks.values()
        return task


def attached(monitor: Monitor) -> StepEvents:
    events = StepEvents()
    events.attach(SimpleNamespace(event_dispatcher=monitor))
    return events


def test_a_monitor_that_begins_in_the_middle_learns_what_a_step_is() -> None:
    monitor = Monitor()
    monitor.enabled = False
    events = attached(monitor)
    events.started(CLAIM)
    monitor.enabled = True
    events.succeeded(CLAIM, "done", 0.5)

    assert (monitor.task.name, monitor.task.state, monitor.task.retries) == ("reviews/judge", "SUCCESS", 2)
    assert monitor.task.kwargs == str({"run": str(UUID(int=2)), "step": "judge[7]", "attempt": 3, "model": "m:1b"})


def test_the_state_of_a_task_follows_that_of_its_step() -> None:
    found = {}
    for state in (StepState.READY, StepState.WAITING, StepState.FAILED, StepState.CANCELLED):
        monitor = Monitor()
        events = attached(monitor)
        events.started(CLAIM)
        events.failed(CLAIM, state, "timeout", "too late " * 100)
        found[state] = monitor.task.state
        assert monitor.task.exception.startswith("timeout: too late")
        assert len(monitor.task.exception) < 330

    assert list(found.values()) == ["RETRY", "RETRY", "FAILURE", "REVOKED"]


def test_without_a_worker_nothing_is_sent() -> None:
    events = StepEvents()
    events.started(CLAIM)
    events.attach(SimpleNamespace(event_dispatcher=None))
    events.lost(CLAIM)

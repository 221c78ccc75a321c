"""Scheduled jobs of an installation: when they run, how they ended; pause, change, and run by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict

from arriero_client import exchange
from arriero_client.effects import Operation, Request
from arriero_client.exchange import Retries
from arriero_client.operations import operation


class ScheduledJob(BaseModel):
    """A scheduled job. Fields that a newer server adds are kept as extra attributes."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    description: str = ""
    state: str
    paused_reason: str | None = None
    #: `every`, or `cron` and `timezone`.
    trigger: Mapping[str, str | None]
    changed: bool = False
    #: Its last pass: `started_at`, `seconds`, `outcome`, `detail`, `worker`.
    last: Mapping[str, Any] | None = None
    next_at: datetime | None = None
    passes: int = 0
    failures: int = 0


class JobPass(BaseModel):
    """A pass of a job."""

    model_config = ConfigDict(extra="allow", frozen=True)

    id: str
    job: str
    by_hand: bool
    #: `requested`, `running`, `ended`, or `lost` when no worker took it.
    state: str
    #: `done`, `idle`, `postponed` or `failed`; None until it has ended.
    outcome: str | None = None
    #: What it did, or why it failed.
    detail: Mapping[str, Any] | None = None
    seconds: float | None = None


class Jobs:
    """The operations on scheduled jobs. They need a key for all namespaces."""

    retries: Retries

    @operation
    def list_jobs(self) -> Operation[Sequence[ScheduledJob]]:
        """Return all scheduled jobs."""
        found = yield from exchange.send_json(Request("GET", "/v1/jobs"), self.retries)
        return [ScheduledJob.model_validate(one) for one in found["jobs"]]

    @operation
    def get_job(self, name: str) -> Operation[ScheduledJob]:
        """Return a scheduled job."""
        return ScheduledJob.model_validate((yield from self._job("GET", name, "")))

    @operation
    def pause_job(self, name: str, reason: str | None = None) -> Operation[ScheduledJob]:
        """Pause a job: nothing triggers it until it is resumed."""
        request = Request("POST", f"{_path(name)}/pause", {"reason": reason})
        return ScheduledJob.model_validate((yield from exchange.send_json(request, self.retries)))

    @operation
    def resume_job(self, name: str) -> Operation[ScheduledJob]:
        """Resume a job."""
        return ScheduledJob.model_validate((yield from self._job("POST", name, "/resume")))

    @operation
    def set_job_trigger(
        self, name: str, *, every: str | None = None, cron: str | None = None, timezone: str | None = None
    ) -> Operation[ScheduledJob]:
        """Change when a job runs, to an interval such as `5m` or a cron expression; neither: as the settings say."""
        given = {"every": every, "cron": cron, "timezone": timezone}
        body = {key: value for key, value in given.items() if value is not None}
        found = yield from self._job("PUT" if body else "DELETE", name, "/trigger", body or None)
        return ScheduledJob.model_validate(found)

    @operation
    def run_job(self, name: str) -> Operation[JobPass]:
        """Request a pass of a job now. Returns it at once; see `get_job_pass`."""
        return JobPass.model_validate((yield from self._job("POST", name, "/run")))

    @operation
    def get_job_pass(self, name: str, pass_id: str) -> Operation[JobPass]:
        """Return a pass of a job."""
        return JobPass.model_validate((yield from self._job("GET", name, f"/passes/{quote(pass_id, safe='')}")))

    def _job(self, method: str, name: str, rest: str, body: Any = None) -> Operation[Any]:
        return (yield from exchange.send_json(Request(method, _path(name) + rest, body=body), self.retries))


def _path(name: str) -> str:
    return f"/v1/jobs/{quote(name, safe='')}"

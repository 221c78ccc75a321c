"""The sections of the work: runs, schedules, control workers and pools."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any

from pydantic import Field, SecretStr, field_validator

from app.kernel.sections.section import CHANGEABLE, Section
from app.kernel.units import durations
from app.kernel.units.durations import Duration


class RunSettings(Section):
    """Leases, sweeps, retention and the sizes of payloads."""

    #: The lease of a step expires when its worker has not renewed it for this long.
    lease: Duration = timedelta(seconds=15)
    #: Interval at which workers renew their leases. At most a third of the lease.
    heartbeat: Duration = timedelta(seconds=3)
    #: Interval of the sweep for lost messages, expired leases and due retries.
    sweep_every: Duration = timedelta(seconds=1)
    #: A step that is ready for this long without a waiting message is published again.
    republish_after: Duration = timedelta(seconds=5)
    #: Most attempts of a step that end with the death of their worker, before the step fails.
    max_worker_losses: int = Field(default=3, ge=1)
    #: Retention of finished runs, unless the workflow or the client sets another one.
    retention: Annotated[Duration, CHANGEABLE] = timedelta(days=30)
    #: Interval of the deletion of runs whose retention is over.
    expire_every: Duration = timedelta(minutes=5)
    #: Most bytes (as JSON) of inputs, an output, an item or an event that are stored in its row. Longer values are
    #: stored in a table of their own, equal ones once.
    inline_bytes: int = Field(default=64 * 1024, ge=0)
    #: Most bytes of one such value; the outputs of all items of a map count as one.
    max_payload_bytes: int = Field(default=64 * 1024 * 1024, ge=1024, le=512 * 1024 * 1024)
    #: Most bytes of outputs that one step or expression can read.
    max_read_bytes: int = Field(default=256 * 1024 * 1024, ge=1024)

    @field_validator("heartbeat")
    @classmethod
    def _at_most_a_third_of_the_lease(cls, value: timedelta, info: Any) -> timedelta:
        lease = info.data.get("lease")
        if lease is not None and value * 3 > lease:
            raise ValueError(f"must be at most a third of runs.lease ({durations.show(lease)})")
        return value


class ScheduleSettings(Section):
    """Schedules of workflows."""

    #: Interval of the check for due fires: a fire is late by at most about this time.
    check_every: Annotated[Duration, durations.at_least("100ms")] = timedelta(seconds=1)
    #: Retention of the history of fires.
    keep_fires: Annotated[Duration, durations.at_least("1m"), CHANGEABLE] = timedelta(days=30)


class ControlSettings(Section):
    """The control workers, which run steps without a model, and scheduled jobs."""

    #: Number of threads of one control worker.
    concurrency: int = Field(default=8, ge=1, le=256)
    #: Number of control workers that `arriero up` starts.
    processes: int = Field(default=1, ge=1, le=64)
    #: Address of the metrics of a control worker, as for pools.
    metrics_host: str = "127.0.0.1"
    metrics_port: int = Field(default=0, ge=0, le=65535, description="0 chooses a free port")


class PoolSettings(Section):
    """The pools: processes that serve a model."""

    #: Models that are kept running: each has a pool that is never stopped to make room. It must be equal on every host.
    models: Annotated[tuple[str, ...], CHANGEABLE] = ("smollm2:135m",)
    #: Cores of this host for all threads of llama.cpp together; 0 means all but one. A pool uses as many of its share
    #: as are fastest, which is measured: when another process uses one of them, all of its threads are delayed.
    threads: int = Field(default=0, ge=0)
    #: Address of the metrics of a pool. Port 0 chooses a free one, which the pool writes to `DATA/metrics/NAME.json`.
    metrics_host: str = "127.0.0.1"
    metrics_port: int = Field(default=0, ge=0, le=65535, description="0 chooses a free port")
    #: The key of encrypted states of prefixes (`store_encrypted` of a model), at least 16 characters. Without it each
    #: pool has a key of its own, and its files end with it.
    store_key: SecretStr | None = None
    #: A pool that does not serve within this time is ended.
    start_timeout: Annotated[Duration, durations.at_least("1s")] = timedelta(minutes=5)
    #: Time for a stopping pool to finish its steps.
    drain_timeout: Duration = timedelta(seconds=20)

    @field_validator("store_key")
    @classmethod
    def _is_long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value()) < 16:
            raise ValueError("a key needs at least 16 characters")
        return value

"""
The rows of the fleet: the schema of its tables. Each column has one kind of writer.

    host          a machine with an agent; written by its agent, its state by operators, its loss by the reconciler
    device        memory of a host and its charged bytes; written by the ledger and the agent
    reservation   a claim that was granted: state, lease, epoch; written by the ledger
    reservation_device  its bytes of each device; written by the ledger
    promise       bytes of a device that pass from a victim to the reservation that waits for it; written by the ledger
    reserved_capacity   bytes that are guaranteed to a configuration, also while it is not loaded; written by the ledger
    quota         the limits of a namespace, written by the API, and its use, written by the ledger and the reconciler
    pool          the desired state: model, devices, reason, and whether it must end; written by the reconciler
    pool_process  the observed process of a pool; written by the host's agent
    pool_report   the last report of a pool; written by its own heartbeat
    layout        the bytes that a configuration needs on devices of a type; written by agents and pools
    refusal       why a model with demand is not started; written by the reconciler
    pool_command  a command of an operator; written by the API, completed by the reconciler
    pool_target   models that are kept running; written by the API
    file_server   where a host serves its model files to other hosts, and which; written by its agent
    arrival_pattern   when a model was requested before; written by the reconciler
    defragmentation   pools that were moved so that models fit, and what that gained; written by the reconciler

Every instant is the database's own. A reservation and its pool have the same id. The sequence `fleet_epoch` numbers
agents and grants.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, Column, DateTime, Index, Text, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import Field, SQLModel

from app.fleet.host import HostState
from app.fleet.ledger.reservation import ReservationState
from app.fleet.pool import Desired, PoolPhase, ProcessState


def _instant(*, nullable: bool = True) -> Any:
    return Column(DateTime(timezone=True), nullable=nullable, server_default=None if nullable else text("now()"))


def _bytes(default: int | None = 0) -> Any:
    return Column(BigInteger, nullable=False, server_default=None if default is None else str(default))


def _one_of(column: str, states: Iterable[str]) -> CheckConstraint:
    listed = ", ".join(f"'{state}'" for state in states)
    return CheckConstraint(f"{column} IN ({listed})", name=f"{column}_is_known")


class HostRow(SQLModel, table=True):
    """A machine with an agent."""

    __tablename__ = "host"
    __table_args__ = (_one_of("state", (state for state in HostState if state is not HostState.LOST)),)

    name: str = Field(primary_key=True, max_length=100)
    #: Set by operators; it survives restarts and losses.
    state: str = Field(max_length=16)
    #: When it was declared lost; cleared when its agent joins.
    lost_at: datetime | None = Field(default=None, sa_column=_instant())
    #: The data directory of its agents, in which they know their processes.
    identity: str = Field(max_length=64)
    #: Epoch of the agent that speaks for it; 0 without one.
    agent_epoch: int = Field(sa_column=_bytes())
    #: Until then the agent counts as alive.
    agent_until: datetime = Field(sa_column=_instant(nullable=False))
    joined_at: datetime = Field(sa_column=_instant(nullable=False))
    cores: int = 1
    #: Configurations whose files it has.
    files: list[str] = Field(sa_column=Column(JSONB, nullable=False))
    #: Sentences for operators: a driver that does not answer, a GPU that was left out.
    problems: list[str] = Field(sa_column=Column(JSONB, nullable=False))


class FileServerRow(SQLModel, table=True):
    """Where a host serves its model files to other hosts."""

    __tablename__ = "file_server"

    host: str = Field(primary_key=True, foreign_key="host.name", ondelete="CASCADE", max_length=100)
    url: str = Field(max_length=600)
    #: What its clients trust, as PEM; empty without TLS.
    certificate: str = Field(sa_column=Column(Text, nullable=False))
    #: With it clients prove that they belong to the installation. Each start of the server makes another one.
    key: str = Field(max_length=64)
    #: The SHA-256 of each file.
    files: list[str] = Field(sa_column=Column(JSONB, nullable=False))
    changed_at: datetime = Field(sa_column=_instant(nullable=False))


class DeviceRow(SQLModel, table=True):
    """Memory of a host. The constraints refuse an overcommitted device even if a defect tries to write one."""

    __tablename__ = "device"
    __table_args__ = (
        CheckConstraint("charged_bytes BETWEEN 0 AND capacity_bytes", name="is_not_overcommitted"),
        CheckConstraint("non_preemptible_bytes BETWEEN 0 AND capacity_bytes", name="non_preemptible_fits"),
        Index("ix_device_host", "host"),
    )

    id: str = Field(primary_key=True, max_length=200)
    host: str = Field(foreign_key="host.name", ondelete="CASCADE", max_length=100)
    name: str = Field(max_length=100)
    kind: str = Field(max_length=16)
    #: The key of its layouts: `cpu`, `NVIDIA H200`, `simulated`.
    type: str = Field(max_length=100)
    #: Pins a process to the device; empty when it is not a GPU.
    uuid: str = Field(default="", max_length=100)
    simulated: bool = False
    #: False when its agent no longer finds it.
    present: bool = True
    speed: float = 1.0
    #: Of a simulated device: bytes loaded per second.
    bandwidth: int | None = Field(default=None, sa_column=Column(BigInteger))
    total_bytes: int = Field(sa_column=_bytes())
    #: Most bytes that all reservations together may have.
    capacity_bytes: int = Field(sa_column=_bytes())
    #: Bytes of the reservations, without those that victims cover.
    charged_bytes: int = Field(sa_column=_bytes())
    #: Bytes that no preemption can free: reserves and pinned pools.
    non_preemptible_bytes: int = Field(sa_column=_bytes())
    #: Measured use: by all processes, and by those without a reservation.
    used_bytes: int = Field(sa_column=_bytes())
    unmanaged_bytes: int = Field(sa_column=_bytes())
    temperature: int | None = None
    utilisation: float | None = None


class ReservationRow(SQLModel, table=True):
    """A claim that was granted."""

    __tablename__ = "reservation"
    __table_args__ = (
        _one_of("state", ReservationState),
        CheckConstraint("(state = 'released') = (released_at IS NOT NULL)", name="released_once"),
        Index("ix_reservation_held", "host", postgresql_where=text("state <> 'released'")),
        Index("ix_reservation_released", "released_at", postgresql_where=text("state = 'released'")),
    )

    id: UUID = Field(primary_key=True)
    epoch: int = Field(sa_column=_bytes(None))
    revision: int = 0
    state: str = Field(max_length=16)
    host: str = Field(foreign_key="host.name", ondelete="CASCADE", max_length=100)
    configuration: str = Field(max_length=200)
    draining: bool = False
    pinned: bool = False
    namespace: str = Field(default="", max_length=100)
    lease_until: datetime = Field(sa_column=_instant(nullable=False))
    granted_at: datetime = Field(sa_column=_instant(nullable=False))
    activated_at: datetime | None = Field(default=None, sa_column=_instant())
    released_at: datetime | None = Field(default=None, sa_column=_instant())
    #: Why it was released.
    release_reason: str | None = Field(default=None, sa_column=Column(Text))


class ReservationDeviceRow(SQLModel, table=True):
    """Bytes of a device that a reservation holds."""

    __tablename__ = "reservation_device"
    __table_args__ = (
        CheckConstraint("bytes > 0", name="is_something"),
        Index("ix_reservation_device_device", "device_id"),
    )

    reservation_id: UUID = Field(primary_key=True, foreign_key="reservation.id", ondelete="CASCADE")
    device_id: str = Field(primary_key=True, foreign_key="device.id", ondelete="CASCADE", max_length=200)
    bytes: int = Field(sa_column=_bytes(None))


class PromiseRow(SQLModel, table=True):
    """Bytes of a device that pass to a reservation when its victim is released."""

    __tablename__ = "promise"
    __table_args__ = (CheckConstraint("bytes > 0", name="is_something"),)

    reservation_id: UUID = Field(primary_key=True, foreign_key="reservation.id", ondelete="CASCADE")
    victim_id: UUID = Field(primary_key=True, foreign_key="reservation.id", ondelete="CASCADE")
    device_id: str = Field(primary_key=True, foreign_key="device.id", ondelete="CASCADE", max_length=200)
    bytes: int = Field(sa_column=_bytes(None))


class ReservedCapacityRow(SQLModel, table=True):
    """Bytes of a device that are guaranteed to a configuration."""

    __tablename__ = "reserved_capacity"
    __table_args__ = (CheckConstraint("bytes > 0", name="is_something"),)

    id: UUID = Field(primary_key=True)
    device_id: str = Field(primary_key=True, foreign_key="device.id", ondelete="CASCADE", max_length=200)
    configuration: str = Field(max_length=200)
    bytes: int = Field(sa_column=_bytes(None))
    created_at: datetime = Field(sa_column=_instant(nullable=False))


class QuotaRow(SQLModel, table=True):
    """The limits of a namespace, and its use."""

    __tablename__ = "quota"

    namespace: str = Field(primary_key=True, max_length=100)
    #: Its weight in the fair share among namespaces.
    weight: float = 1.0
    #: Most bytes that pools granted for it may hold; None: no limit.
    max_bytes: int | None = Field(default=None, sa_column=Column(BigInteger))
    held_bytes: int = Field(sa_column=_bytes())
    #: Most seconds of device time in a period; None: no limit.
    max_device_seconds: float | None = None
    period_seconds: int = 86400
    period_began: datetime = Field(sa_column=_instant(nullable=False))
    #: Seconds of device time used in this period.
    device_seconds: float = 0.0
    #: Seconds of device time that count for fairness: they halve every hour.
    attained_seconds: float = 0.0
    counted_at: datetime = Field(sa_column=_instant(nullable=False))


class PoolRow(SQLModel, table=True):
    """The desired state of a pool."""

    __tablename__ = "pool"
    __table_args__ = (_one_of("desired", Desired), Index("ix_pool_configuration", "configuration", "created_at"))

    id: UUID = Field(primary_key=True, foreign_key="reservation.id", ondelete="CASCADE")
    configuration: str = Field(max_length=200)
    model: str = Field(max_length=200)
    slots: int
    #: Why it was started: a keyword, and a sentence.
    purpose: str = Field(max_length=16)
    reason: str = Field(sa_column=Column(Text, nullable=False))
    desired: str = Field(max_length=16)
    #: Why it must end.
    stop_reason: str | None = Field(default=None, sa_column=Column(Text))
    #: Expected seconds from its grant until it serves.
    estimate_seconds: float = 0.0
    created_at: datetime = Field(sa_column=_instant(nullable=False))
    stop_at: datetime | None = Field(default=None, sa_column=_instant())


class PoolProcessRow(SQLModel, table=True):
    """The observed process of a pool."""

    __tablename__ = "pool_process"
    __table_args__ = (_one_of("state", ProcessState),)

    pool_id: UUID = Field(primary_key=True, foreign_key="pool.id", ondelete="CASCADE")
    state: str = Field(max_length=16)
    pid: int | None = None
    #: Its share of the host's cores.
    threads: int | None = None
    started_at: datetime = Field(sa_column=_instant(nullable=False))
    ended_at: datetime | None = Field(default=None, sa_column=_instant())
    returncode: int | None = None
    #: It ended in another way than requested.
    failed: bool = False
    #: How it ended, in a sentence.
    ending: str | None = Field(default=None, sa_column=Column(Text))
    #: The last lines of its log.
    log_tail: str = Field(default="", sa_column=Column(Text, nullable=False, server_default=""))
    #: Measured bytes by id of the device: now, and the maximum so far.
    used: dict[str, int] = Field(sa_column=Column(JSONB, nullable=False, server_default="{}"))
    peak: dict[str, int] = Field(sa_column=Column(JSONB, nullable=False, server_default="{}"))


class PoolReportRow(SQLModel, table=True):
    """The last report of a pool."""

    __tablename__ = "pool_report"
    __table_args__ = (_one_of("phase", PoolPhase),)

    pool_id: UUID = Field(primary_key=True, foreign_key="pool.id", ondelete="CASCADE")
    phase: str = Field(max_length=16)
    #: Of the load, 0 to 1.
    progress: float = 0.0
    #: A sentence for operators: why it refused, what it measured.
    detail: str = Field(default="", sa_column=Column(Text, nullable=False, server_default=""))
    #: Its name in Celery and Flower.
    worker: str = Field(default="", max_length=200)
    #: Number of steps that it works on, and their highest priority class.
    busy: int = 0
    urgent: str | None = Field(default=None, max_length=16)
    #: How long its engine has had work and made no progress, in milliseconds.
    stalled_ms: int = Field(default=0, sa_column=_bytes())
    heartbeat_at: datetime = Field(sa_column=_instant(nullable=False))
    serving_at: datetime | None = Field(default=None, sa_column=_instant())
    last_used_at: datetime | None = Field(default=None, sa_column=_instant())


class LayoutRow(SQLModel, table=True):
    """The bytes that a configuration needs on devices of a type."""

    __tablename__ = "layout"

    configuration: str = Field(primary_key=True, max_length=200)
    type: str = Field(primary_key=True, max_length=100)
    #: Number of devices that share it.
    devices: int = Field(primary_key=True)
    #: Bytes on each of them, margins included.
    parts: list[int] = Field(sa_column=Column(JSONB, nullable=False))
    #: Bytes of the host's RAM in addition to GPUs.
    ram_bytes: int = Field(sa_column=_bytes())
    #: Its source, the best first: measured, dry run, closed form, catalogue.
    source: str = Field(max_length=32)
    #: From the start of the process until it serves.
    load_seconds: float = 0.0
    #: Of one slot.
    tokens_per_second: float = 1.0
    measured_at: datetime = Field(sa_column=_instant(nullable=False))


class RefusalRow(SQLModel, table=True):
    """The reason why a model with demand is not started."""

    __tablename__ = "refusal"

    configuration: str = Field(primary_key=True, max_length=200)
    model: str = Field(max_length=200)
    reason: str = Field(sa_column=Column(Text, nullable=False))
    needs_bytes: int = Field(sa_column=_bytes())
    #: Seconds until it is expected to serve; None when waiting alone does not help.
    estimate_seconds: float | None = None
    since: datetime = Field(sa_column=_instant(nullable=False))
    at: datetime = Field(sa_column=_instant(nullable=False))


class PoolCommandRow(SQLModel, table=True):
    """A command of an operator."""

    __tablename__ = "pool_command"
    __table_args__ = (
        Index("ix_pool_command_open", "created_at", postgresql_where=text("done_at IS NULL")),
        Index("ix_pool_command_start", "created_at", postgresql_where=text("command = 'start'")),
        Index("ix_pool_command_done", "done_at", postgresql_where=text("done_at IS NOT NULL")),
    )

    id: UUID = Field(primary_key=True)
    #: `start` or `stop`.
    command: str = Field(max_length=8)
    model: str = Field(max_length=200)
    #: The pool to stop.
    pool_id: UUID | None = None
    reason: str = Field(sa_column=Column(Text, nullable=False))
    created_at: datetime = Field(sa_column=_instant(nullable=False))
    done_at: datetime | None = Field(default=None, sa_column=_instant())


class PoolTargetRow(SQLModel, table=True):
    """A model that is kept running until an operator stops it."""

    __tablename__ = "pool_target"

    model: str = Field(primary_key=True, max_length=200)
    pools: int
    #: Its pools are never preempted.
    pinned: bool = False
    created_at: datetime = Field(sa_column=_instant(nullable=False))


class ArrivalPatternRow(SQLModel, table=True):
    """When a model was last requested, and the gaps between its last arrivals."""

    __tablename__ = "arrival_pattern"

    model: str = Field(primary_key=True, max_length=200)
    last_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False))
    #: Class of the last request.
    priority: str = Field(max_length=16)
    #: Seconds, the newest last.
    gaps: list[float] = Field(sa_column=Column(JSONB, nullable=False))


class DefragmentationRow(SQLModel, table=True):
    """Pools that were moved so that models fit."""

    __tablename__ = "defragmentation"

    at: datetime = Field(sa_column=Column(DateTime(timezone=True), primary_key=True, server_default=text("now()")))
    #: Each with its reason.
    moves: list[dict[str, str]] = Field(sa_column=Column(JSONB, nullable=False))
    gains: list[dict[str, str]] = Field(sa_column=Column(JSONB, nullable=False))
    stuck: list[dict[str, str]] = Field(sa_column=Column(JSONB, nullable=False))

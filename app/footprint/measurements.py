"""
Measurements: what models took where they ran, so that the next one need not be guessed.

A row belongs to an identity: the header of the file, the build of llama.cpp, the processor, the GPUs with their driver,
and the configuration. It keeps what was measured, what llama.cpp's dry run said, and how often memory ran out.
Memory that ran out makes the margins of that identity larger, and those of its family a little, until a pool has served
to its end, or for a day in which nothing was loaded so.

What processes take besides models is kept for each device of a host, the greatest seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Column, DateTime, Index, text
from sqlalchemy.dialects.postgresql import JSON
from sqlmodel import Field, SQLModel

from app.catalog.metadata import Header
from app.devices.device import CPU, MeasuredDevice
from app.footprint.closed_form import GUESS, ProcessMemory
from app.footprint.configuration import LoadConfiguration
from app.footprint.footprint import Footprint
from app.kernel.database import UnitOfWork

#: Part of the total that margins have at the least once memory ran out, and what each further time makes of it.
_RAISED, _RAISED_FAMILY, _AGAIN, _MOST = 0.10, 0.05, 1.5, 0.5


def _instant() -> Any:
    return Column(DateTime(timezone=True), nullable=False, server_default=text("now()"))


class FootprintRow(SQLModel, table=True):
    """What is known of one identity."""

    __tablename__ = "footprint"
    __table_args__ = (Index("ix_footprint_failed", "family", postgresql_where=text("failures > 0")),)

    #: The hash of the identity.
    key: str = Field(primary_key=True, max_length=64)
    #: Architecture and devices.
    family: str = Field(max_length=400)
    #: What the key is the hash of, for people.
    identity: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    measured: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    dry_run: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    #: Times that it was measured.
    loads: int = Field(default=0, sa_column_kwargs={"server_default": "0"})
    #: Times that memory ran out since a pool served to its end.
    failures: int = Field(default=0, sa_column_kwargs={"server_default": "0"})
    created_at: datetime = Field(sa_column=_instant())
    updated_at: datetime = Field(sa_column=_instant())


class ProcessMemoryRow(SQLModel, table=True):
    """What a process takes of a device before it holds a model."""

    __tablename__ = "process_memory"

    host: str = Field(primary_key=True, max_length=255)
    #: `cpu`, or the UUID of a GPU.
    device: str = Field(primary_key=True, max_length=100)
    build: str = Field(primary_key=True, max_length=100)
    bytes: int = Field(sa_column=Column(BigInteger, nullable=False))
    updated_at: datetime = Field(sa_column=_instant())


@dataclass(frozen=True, slots=True)
class Identity:
    """What decides a footprint, together."""

    header: Header
    configuration: LoadConfiguration
    #: The GPUs, in the order in which the process sees them.
    devices: tuple[MeasuredDevice, ...]
    build: str
    #: Its kernels keep some weights in an order of their own.
    processor: str = ""
    adapters: tuple[Header, ...] = ()
    projector: Header | None = None

    @property
    def family(self) -> str:
        """What is likely to be wrong in the same way: the architecture, on the same devices."""
        return f"{self.header.architecture} on {', '.join(device.model for device in self.devices) or 'cpu'}"[:400]

    @property
    def key(self) -> str:
        """The hash of it."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "model": self.header.digest,
            "name": self.header.name,
            "adapters": [adapter.digest for adapter in self.adapters],
            "projector": self.projector.digest if self.projector else None,
            "build": self.build,
            "processor": self.processor,
            "devices": [[device.model, device.driver] for device in self.devices],
            "configuration": self.configuration.as_json(),
        }


@dataclass(frozen=True, slots=True)
class KnownFootprint:
    """What the database knows of an identity."""

    measured: Footprint | None = None
    dry_run: Footprint | None = None
    #: Part of the total that margins have at the least.
    floor: float = 0.0


# What was long ago keeps nothing from being loaded.
_RECENT = "CASE WHEN footprint.updated_at > now() - interval '1 day' THEN footprint.failures ELSE 0 END"
_FIND = text(f"SELECT measured, dry_run, {_RECENT} AS failures FROM footprint WHERE key = :key")
_FAMILY = text(f"""
    SELECT COALESCE(max({_RECENT}), 0) AS failures FROM footprint
    WHERE family = :family AND key <> :key AND failures > 0
""")
_KEEP_DRY_RUN = text("""
    INSERT INTO footprint (key, family, identity, dry_run)
    VALUES (:key, :family, CAST(:identity AS json), CAST(:footprint AS json))
    ON CONFLICT (key) DO UPDATE SET dry_run = EXCLUDED.dry_run, updated_at = now()
""")
_KEEP_MEASURED = text("""
    INSERT INTO footprint (key, family, identity, measured, loads)
    VALUES (:key, :family, CAST(:identity AS json), CAST(:footprint AS json), 1)
    ON CONFLICT (key) DO UPDATE SET measured = EXCLUDED.measured, loads = footprint.loads + 1, updated_at = now()
""")
_LOCK = text("SELECT measured FROM footprint WHERE key = :key FOR UPDATE")
_COUNT_FAILURE = text(f"""
    INSERT INTO footprint (key, family, identity, failures) VALUES (:key, :family, CAST(:identity AS json), 1)
    ON CONFLICT (key) DO UPDATE SET failures = {_RECENT} + 1,
                                    updated_at = now()
""")
_FORGET_FAILURES = text("UPDATE footprint SET failures = 0 WHERE key = :key AND failures > 0")
_PROCESS = text("""
    SELECT device, bytes FROM process_memory WHERE host = :host AND build = :build
""")
_KEEP_PROCESS = text("""
    INSERT INTO process_memory (host, device, build, bytes) VALUES (:host, :device, :build, :bytes)
    ON CONFLICT (host, device, build) DO UPDATE SET bytes = GREATEST(process_memory.bytes, EXCLUDED.bytes),
                                                    updated_at = now()
""")


def find(work: UnitOfWork, identity: Identity) -> KnownFootprint:
    """What is known of that identity, and how much its margins are raised."""
    row = work.row(_FIND, {"key": identity.key})
    family = work.row(_FAMILY, {"key": identity.key, "family": identity.family})
    assert family is not None, "an aggregate gives one row"
    floor = _floor(_RAISED_FAMILY, family.failures)
    if row is None:
        return KnownFootprint(floor=floor)
    measured, dry_run = (Footprint.of_json(given) if given else None for given in (row.measured, row.dry_run))
    return KnownFootprint(measured, dry_run, max(floor, _floor(_RAISED, row.failures)))


def keep_dry_run(work: UnitOfWork, identity: Identity, footprint: Footprint) -> None:
    """Remember what llama.cpp said of that identity: it will say the same again."""
    work.run(_KEEP_DRY_RUN, _of(identity) | {"footprint": json.dumps(footprint.as_json())})


def keep_measured(work: UnitOfWork, identity: Identity, footprint: Footprint) -> Footprint:
    """Remember what was measured, the greater where it was measured before; gives what is known now."""
    row = work.row(_LOCK, {"key": identity.key})
    if row is not None and row.measured:
        footprint = footprint.or_greater(Footprint.of_json(row.measured))
    work.run(_KEEP_MEASURED, _of(identity) | {"footprint": json.dumps(footprint.as_json())})
    return footprint


def count_failure(work: UnitOfWork, identity: Identity) -> None:
    """Memory ran out for that identity, though it was thought to fit."""
    work.run(_COUNT_FAILURE, _of(identity))


def forget_failures(work: UnitOfWork, identity: Identity) -> None:
    """A pool of that identity served to its end: its memory was enough."""
    work.run(_FORGET_FAILURES, {"key": identity.key})


def process(work: UnitOfWork, host: str, build: str, devices: Sequence[MeasuredDevice]) -> ProcessMemory:
    """What a process takes on these GPUs of that host besides a model: as measured there, or a guess."""
    known = {row.device: row.bytes for row in work.rows(_PROCESS, {"host": host, "build": build})}
    contexts = [known.get(device.uuid, GUESS.context) for device in devices]
    return ProcessMemory(known.get(CPU, GUESS.base), max(contexts, default=GUESS.context))


def keep_process(work: UnitOfWork, host: str, build: str, device: str, size: int) -> None:
    """Remember what a process takes of a device of that host: `cpu`, or the UUID of a GPU."""
    work.run(_KEEP_PROCESS, {"host": host, "build": build, "device": device, "bytes": size})


def _of(identity: Identity) -> dict[str, Any]:
    return {"key": identity.key, "family": identity.family, "identity": json.dumps(identity.as_json())}


def _floor(first: float, failures: int) -> float:
    return min(first * _AGAIN ** (failures - 1), _MOST) if failures else 0.0

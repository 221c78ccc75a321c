"""
Measurements: the memory that models used when they ran, stored for later estimates.

A row belongs to an identity: the header of the file, the build of llama.cpp, the processor, the GPUs with their driver,
and the configuration. It holds the measurement, the result of llama.cpp's dry run, and how often memory ran out.
After memory ran out, the margins of that identity are larger, and those of its family slightly larger, until a pool
has served to its end, or until a day has passed without an update of the row.

The memory of a process without a model is stored for each device of a host, as the maximum of all measurements.
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
from app.footprint.closed_form import DEFAULT_PROCESS, ProcessMemory
from app.footprint.configuration import LoadConfiguration
from app.footprint.footprint import Footprint
from app.kernel.database import UnitOfWork

#: Minimum margin, as a part of the total, after memory ran out once: of the identity and of its family; the factor for
#: each further time; and the maximum.
_RAISED_MARGIN, _RAISED_FAMILY_MARGIN, _MARGIN_FACTOR, _MAX_MARGIN = 0.10, 0.05, 1.5, 0.5


def _instant() -> Any:
    return Column(DateTime(timezone=True), nullable=False, server_default=text("now()"))


class FootprintRow(SQLModel, table=True):
    """The stored footprints and failures of one identity."""

    __tablename__ = "footprint"
    __table_args__ = (Index("ix_footprint_failed", "family", postgresql_where=text("failures > 0")),)

    #: The hash of the identity.
    key: str = Field(primary_key=True, max_length=64)
    #: Architecture and device models.
    family: str = Field(max_length=400)
    #: The identity in readable form; the key is its hash.
    identity: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    measured: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    dry_run: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    #: Number of measurements.
    loads: int = Field(default=0, sa_column_kwargs={"server_default": "0"})
    #: How often memory ran out since a pool last served to its end.
    failures: int = Field(default=0, sa_column_kwargs={"server_default": "0"})
    created_at: datetime = Field(sa_column=_instant())
    updated_at: datetime = Field(sa_column=_instant())


class ProcessMemoryRow(SQLModel, table=True):
    """The memory that a process uses on a device before it loads a model."""

    __tablename__ = "process_memory"

    host: str = Field(primary_key=True, max_length=255)
    #: `cpu`, or the UUID of a GPU.
    device: str = Field(primary_key=True, max_length=100)
    build: str = Field(primary_key=True, max_length=100)
    bytes: int = Field(sa_column=Column(BigInteger, nullable=False))
    updated_at: datetime = Field(sa_column=_instant())


@dataclass(frozen=True, slots=True)
class Identity:
    """Everything that determines a footprint."""

    header: Header
    configuration: LoadConfiguration
    #: The GPUs, in the order in which the process sees them.
    devices: tuple[MeasuredDevice, ...]
    build: str
    #: Name of the processor: some weights are repacked for its kernels.
    processor: str = ""
    adapters: tuple[Header, ...] = ()
    projector: Header | None = None
    draft: Header | None = None

    @property
    def family(self) -> str:
        """Identities that probably have the same error: the same architecture on the same devices."""
        return f"{self.header.architecture} on {', '.join(device.type for device in self.devices) or 'cpu'}"[:400]

    @property
    def key(self) -> str:
        """The SHA-256 of the identity."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """Returns the identity as plain data."""
        # Without a draft model there is no such key, so that earlier measurements stay valid.
        return ({"draft": self.draft.digest} if self.draft else {}) | {
            "model": self.header.digest,
            "name": self.header.name,
            "adapters": [adapter.digest for adapter in self.adapters],
            "projector": self.projector.digest if self.projector else None,
            "build": self.build,
            "processor": self.processor,
            "devices": [[device.type, device.driver] for device in self.devices],
            "configuration": self.configuration.as_json(),
        }


@dataclass(frozen=True, slots=True)
class KnownFootprint:
    """The footprints of an identity in the database."""

    measured: Footprint | None = None
    dry_run: Footprint | None = None
    #: Minimum margin as a part of the total.
    margin_floor: float = 0.0


# Old failures do not affect new loads.
_RECENT = "CASE WHEN footprint.updated_at > now() - interval '1 day' THEN footprint.failures ELSE 0 END"
_FIND = text(f"SELECT measured, dry_run, {_RECENT} AS failures FROM footprint WHERE key = :key")
_FAMILY = text(f"""
    SELECT COALESCE(max({_RECENT}), 0) AS failures FROM footprint
    WHERE family = :family AND key <> :key AND failures > 0
""")
_RECORD_DRY_RUN = text("""
    INSERT INTO footprint (key, family, identity, dry_run)
    VALUES (:key, :family, CAST(:identity AS json), CAST(:footprint AS json))
    ON CONFLICT (key) DO UPDATE SET dry_run = EXCLUDED.dry_run, updated_at = now()
""")
_RECORD_MEASURED = text("""
    INSERT INTO footprint (key, family, identity, measured, loads)
    VALUES (:key, :family, CAST(:identity AS json), CAST(:footprint AS json), 1)
    ON CONFLICT (key) DO UPDATE SET measured = EXCLUDED.measured, loads = footprint.loads + 1, updated_at = now()
""")
_LOCK = text("SELECT measured FROM footprint WHERE key = :key FOR UPDATE")
_RECORD_FAILURE = text(f"""
    INSERT INTO footprint (key, family, identity, failures) VALUES (:key, :family, CAST(:identity AS json), 1)
    ON CONFLICT (key) DO UPDATE SET failures = {_RECENT} + 1,
                                    updated_at = now()
""")
_CLEAR_FAILURES = text("UPDATE footprint SET failures = 0 WHERE key = :key AND failures > 0")
_PROCESS_MEMORY = text("""
    SELECT device, bytes FROM process_memory WHERE host = :host AND build = :build
""")
_RECORD_PROCESS_MEMORY = text("""
    INSERT INTO process_memory (host, device, build, bytes) VALUES (:host, :device, :build, :bytes)
    ON CONFLICT (host, device, build) DO UPDATE SET bytes = GREATEST(process_memory.bytes, EXCLUDED.bytes),
                                                    updated_at = now()
""")


def find(work: UnitOfWork, identity: Identity) -> KnownFootprint:
    """Returns the stored footprints of that identity, and its minimum margin."""
    row = work.row(_FIND, {"key": identity.key})
    family = work.row(_FAMILY, {"key": identity.key, "family": identity.family})
    assert family is not None, "an aggregate returns one row"
    floor = _margin_floor(_RAISED_FAMILY_MARGIN, family.failures)
    if row is None:
        return KnownFootprint(margin_floor=floor)
    measured, dry_run = (Footprint.of_json(given) if given else None for given in (row.measured, row.dry_run))
    return KnownFootprint(measured, dry_run, max(floor, _margin_floor(_RAISED_MARGIN, row.failures)))


def record_dry_run(work: UnitOfWork, identity: Identity, footprint: Footprint) -> None:
    """Stores the result of a dry run; it is the same for each dry run of that identity."""
    work.run(_RECORD_DRY_RUN, _parameters(identity) | {"footprint": json.dumps(footprint.as_json())})


def record_measured(work: UnitOfWork, identity: Identity, footprint: Footprint) -> Footprint:
    """Stores a measurement. For each place the greater of the old and the new share is kept; returns the result."""
    row = work.row(_LOCK, {"key": identity.key})
    if row is not None and row.measured:
        footprint = footprint.maximum(Footprint.of_json(row.measured))
    work.run(_RECORD_MEASURED, _parameters(identity) | {"footprint": json.dumps(footprint.as_json())})
    return footprint


def record_failure(work: UnitOfWork, identity: Identity) -> None:
    """Records that memory ran out for that identity although it was expected to fit."""
    work.run(_RECORD_FAILURE, _parameters(identity))


def clear_failures(work: UnitOfWork, identity: Identity) -> None:
    """Resets the failures of that identity, because a pool has served to its end."""
    work.run(_CLEAR_FAILURES, {"key": identity.key})


def process_memory(work: UnitOfWork, host: str, build: str, devices: Sequence[MeasuredDevice]) -> ProcessMemory:
    """Returns the memory of a process without a model on these GPUs: measured on that host, or the default."""
    known = {row.device: row.bytes for row in work.rows(_PROCESS_MEMORY, {"host": host, "build": build})}
    contexts = [0 if device.software else known.get(device.uuid, DEFAULT_PROCESS.context) for device in devices]
    return ProcessMemory(known.get(CPU, DEFAULT_PROCESS.base), max(contexts, default=DEFAULT_PROCESS.context))


def record_process_memory(work: UnitOfWork, host: str, build: str, device: str, size: int) -> None:
    """Stores the memory of a process on a device of that host. `device` is `cpu`, or the UUID of a GPU."""
    work.run(_RECORD_PROCESS_MEMORY, {"host": host, "build": build, "device": device, "bytes": size})


def _parameters(identity: Identity) -> dict[str, Any]:
    return {"key": identity.key, "family": identity.family, "identity": json.dumps(identity.as_json())}


def _margin_floor(first: float, failures: int) -> float:
    return min(first * _MARGIN_FACTOR ** (failures - 1), _MAX_MARGIN) if failures else 0.0

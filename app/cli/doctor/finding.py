"""
Findings: the results of the checks of `arriero doctor`, and the thresholds from which something is wrong.

Nothing here measures anything: the caller passes the measured values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from app.kernel.units.sizes import rounded

#: Free bytes of a file system: below the first, Postgres may soon stop; below the second, a model may not fit.
_DISK_PROBLEM, _DISK_WARNING = 1 << 30, 10 << 30
#: Seconds between two clocks: times of logs and keys are confusing from the first on, and wrong from the second on.
_CLOCK_WARNING, _CLOCK_PROBLEM = 2.0, 60.0
#: The part of Postgres's connections from which new processes may find none.
_CONNECTIONS_WARNING = 0.8
#: The first version of Postgres that is supported, as `server_version_num` says it.
_POSTGRES = 140_000


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    #: It works, and something should be done.
    WARNING = "warning"
    PROBLEM = "problem"
    #: It could not be checked, because of another problem.
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    check: str
    severity: Level
    detail: str
    #: What to do; empty when nothing is to be done.
    remedy: str = ""


def ok(check: str, detail: str) -> Finding:
    """Nothing is wrong."""
    return Finding(check, Level.OK, detail)


def warning(check: str, detail: str, remedy: str) -> Finding:
    """It works, and something should be done."""
    return Finding(check, Level.WARNING, detail, remedy)


def problem(check: str, detail: str, remedy: str) -> Finding:
    """Something does not work."""
    return Finding(check, Level.PROBLEM, detail, remedy)


def skipped(check: str, detail: str) -> Finding:
    """It could not be checked."""
    return Finding(check, Level.SKIPPED, detail)


def of_disk(path: Path, free: int, total: int) -> Finding:
    """Whether a file system has room."""
    detail = f"{path}: {rounded(free)} of {rounded(total)} are free"
    remedy = "free some space, shorten runs.retention, or move data_dir; `arriero models list` shows downloaded models"
    if free < _DISK_PROBLEM:
        return problem("disk", detail, remedy)
    return warning("disk", detail, remedy) if free < _DISK_WARNING else ok("disk", detail)


def of_clock(server: str, ahead: float) -> Finding:
    """Whether the clock of a server is that of this machine; `ahead` in seconds."""
    seconds = abs(ahead)
    if seconds < _CLOCK_WARNING:
        return ok("clocks", f"{server} agrees with this machine within {max(seconds, 0.1):.1f} s")
    detail = f"the clock of {server} is {seconds:.1f} s {'ahead of' if ahead > 0 else 'behind'} that of this machine"
    remedy = "synchronise the clocks with NTP: `timedatectl set-ntp true`, or chrony"
    return (problem if seconds >= _CLOCK_PROBLEM else warning)("clocks", detail, remedy)


def of_broker(info: Mapping[str, Any]) -> list[Finding]:
    """Whether the broker is set so that it loses nothing; `info` is what the command INFO answers."""
    version = info.get("valkey_version") or info.get("redis_version") or "unknown"
    used, limit = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    found = [ok("broker", f"version {version}, {rounded(used)} of memory in use")]
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if limit and policy != "noeviction":
        found.append(
            problem(
                "broker",
                f"maxmemory-policy is {policy}: it may drop messages and the schedule when its memory is full",
                "set maxmemory-policy noeviction",
            )
        )
    if limit and used > limit * _CONNECTIONS_WARNING:
        detail = f"{rounded(used)} of maxmemory {rounded(limit)} are in use"
        found.append(warning("broker", detail, "raise maxmemory, or shorten cache.ttl"))
    if info.get("role") not in (None, "master"):
        found.append(problem("broker", "it is a replica, which accepts no writes", "point redis_url at the primary"))
    return found


def of_database(version: int, connections: int, limit: int, *, has_vector: bool) -> list[Finding]:
    """Whether Postgres is of a supported version, has pgvector, and has connections left."""
    found = [ok("database", f"Postgres {version // 10_000}.{version % 10_000}, {connections} of {limit} connections")]
    if version < _POSTGRES:
        found.append(problem("database", f"Postgres {version // 10_000} is too old", "upgrade to 14 or later"))
    if not has_vector:
        found.append(
            problem("database", "the extension pgvector is missing", "install pgvector, then `arriero db upgrade`")
        )
    if connections > limit * _CONNECTIONS_WARNING:
        detail = f"{connections} of {limit} connections are in use"
        found.append(warning("database", detail, "raise max_connections, or put PgBouncer before it"))
    return found


def exit_code(findings: Iterable[Finding], *, strict: bool) -> int:
    """Return 1 when there is a problem, or with `strict` a warning; otherwise 0."""
    bad = {Level.PROBLEM, Level.WARNING} if strict else {Level.PROBLEM}
    return int(any(one.severity in bad for one in findings))

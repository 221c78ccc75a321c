"""From when on something is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.cli.doctor.finding import (
    Level,
    exit_code,
    of_broker,
    of_clock,
    of_database,
    of_disk,
    ok,
    problem,
    warning,
)

GIB = 1 << 30


@pytest.mark.parametrize(
    ("free", "severity"),
    [(500 * GIB, Level.OK), (5 * GIB, Level.WARNING), (GIB // 2, Level.PROBLEM)],
)
def test_disk(free: int, severity: Level) -> None:
    found = of_disk(Path("/data"), free, 1000 * GIB)
    assert found.severity is severity
    assert bool(found.remedy) is (severity is not Level.OK)


@pytest.mark.parametrize(
    ("ahead", "severity", "word"),
    [
        (0.3, Level.OK, "agrees"),
        (-5.0, Level.WARNING, "behind"),
        (90.0, Level.PROBLEM, "ahead of"),
    ],
)
def test_clocks(ahead: float, severity: Level, word: str) -> None:
    found = of_clock("Postgres", ahead)
    assert found.severity is severity
    assert word in found.detail


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({"valkey_version": "8.1", "maxmemory": 0, "maxmemory_policy": "allkeys-lru"}, []),
        ({"redis_version": "7.2", "maxmemory": 100, "maxmemory_policy": "allkeys-lru"}, ["drop messages"]),
        ({"maxmemory": 100, "used_memory": 90, "maxmemory_policy": "noeviction"}, ["of maxmemory"]),
        ({"role": "slave"}, ["replica"]),
    ],
)
def test_the_broker(info: dict[str, Any], words: list[str]) -> None:
    first, *others = of_broker(info)
    assert first.severity is Level.OK
    assert len(others) == len(words)
    assert all(word in found.detail and found.remedy for word, found in zip(words, others, strict=True))


def test_the_database() -> None:
    assert [one.severity for one in of_database(180_006, 10, 100, has_vector=True)] == [Level.OK]
    found = of_database(130_001, 95, 100, has_vector=False)
    assert [one.severity for one in found[1:]] == [
        Level.PROBLEM,
        Level.PROBLEM,
        Level.WARNING,
    ]


def test_warnings_count_only_when_asked() -> None:
    well, half, bad = ok("disk", "x"), warning("disk", "x", "y"), problem("disk", "x", "y")
    assert exit_code([well], strict=True) == exit_code([well, half], strict=False) == 0
    assert exit_code([well, half], strict=True) == exit_code([bad, well], strict=False) == 1

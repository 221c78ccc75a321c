"""
Stamps: when the work of each step began and ended, as its worker saw it.

All workers of a contender add to one file, a line for each step. They run on one machine and read one clock.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Stamp:
    """The work of one step."""

    #: The run and the step in it: `<run>/s3`, `<run>/m[7]`.
    label: str
    #: Seconds of the clock.
    began: float
    ended: float


class Stamps:
    """The file, for a worker."""

    def __init__(self, file: Path) -> None:
        self._file = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def add(self, label: str, began: float, ended: float) -> None:
        """One write, which the system keeps in one piece."""
        os.write(self._file, f"{label} {began:.6f} {ended:.6f}\n".encode())


def taken(file: Path) -> list[Stamp]:
    """All stamps of the file, which is empty then. Nobody may be at work."""
    if not file.exists():
        return []
    lines = file.read_text().splitlines()
    os.truncate(file, 0)
    return [Stamp(label, float(began), float(ended)) for label, began, ended in map(str.split, lines)]


def chain_gaps(stamps: Iterable[Stamp]) -> list[float]:
    """Seconds from the end of each step `s<n>` of a run until `s<n + 1>` of it began."""
    found: list[float] = []
    for steps in _by_run(stamps).values():
        chain = sorted((int(key[1:]), stamp) for key, stamp in steps.items())
        found += [later.began - earlier.ended for (_, earlier), (_, later) in itertools.pairwise(chain)]
    return found


def join_gaps(stamps: Iterable[Stamp]) -> list[float]:
    """Seconds from the end of the last item `m[<n>]` of a run until its step `all` began."""
    found: list[float] = []
    for steps in _by_run(stamps).values():
        last = max(stamp.ended for key, stamp in steps.items() if key.startswith("m["))
        found.append(steps["all"].began - last)
    return found


def _by_run(stamps: Iterable[Stamp]) -> Mapping[str, Mapping[str, Stamp]]:
    runs: dict[str, dict[str, Stamp]] = {}
    for stamp in stamps:
        run, _, key = stamp.label.partition("/")
        runs.setdefault(run, {})[key] = stamp
    return runs

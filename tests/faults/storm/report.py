"""The report of a storm, as text and as JSON."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from tests.faults.storm.measure import Availability, Growth

#: Most problems that are listed in the text.
_LISTED = 30


@dataclass
class StormReport:
    """What was observed."""

    seed: int
    #: Seconds of the whole storm, of its faults, and of the calm work after them.
    seconds: float = 0.0
    stormy: float = 0.0
    calm: float = 0.0
    #: By fault, the seconds from its begin until a run that was submitted after it had ended.
    recoveries: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    not_run: dict[str, str] = field(default_factory=dict)
    work: Counter[str] = field(default_factory=Counter)
    effects: dict[str, int] = field(default_factory=dict)
    starts: Counter[str] = field(default_factory=Counter)
    availability: dict[str, Availability] = field(default_factory=dict)
    growth: dict[str, Growth] = field(default_factory=dict)
    #: By kind of process, the most bytes and the most open files.
    most: dict[str, tuple[int, int]] = field(default_factory=dict)
    ledger_checks: int = 0
    settled: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def faults(self) -> int:
        return sum(len(times) for times in self.recoveries.values())

    def as_json(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "stormy_seconds": round(self.stormy, 1),
            "calm_seconds": round(self.calm, 1),
            "faults": self.faults,
            "recoveries": {name: _spread(times) for name, times in sorted(self.recoveries.items())},
            "not_run": self.not_run,
            "work": dict(sorted(self.work.items())),
            "effects": self.effects,
            "starts": dict(self.starts),
            "availability": {path: one.as_json() for path, one in self.availability.items()},
            "growth": {kind: one._asdict() for kind, one in sorted(self.growth.items())},
            "most": {kind: {"bytes": size, "files": files} for kind, (size, files) in sorted(self.most.items())},
            "ledger_checks": self.ledger_checks,
            "settled_seconds": round(self.settled, 1),
            "problems": self.problems,
        }

    def text(self) -> str:
        lines = [
            f"{self.faults} faults in {self.stormy:.0f} s, then {self.calm:.0f} s of calm work; seed {self.seed}",
            f"work: {_listed(self.work)}",
            f"effects: {_listed(Counter(self.effects))}; starts: {_listed(self.starts)}",
            f"all runs had ended {self.settled:.0f} s after the last fault; {self.ledger_checks} checks of the ledger",
            *(f"not run: {name}: {reason}" for name, reason in self.not_run.items()),
            "",
            f"{'fault':<24}{'count':>6}{'median s':>10}{'p95 s':>8}{'most s':>8}",
        ]
        for name, times in sorted(self.recoveries.items()):
            one = _spread(times)
            lines.append(
                f"{name:<24}{one['count']:>6.0f}{one['median_s']:>10.1f}{one['p95_s']:>8.1f}{one['most_s']:>8.1f}"
            )
        lines.append("")
        for path, available in self.availability.items():
            found = available.as_json()
            lines.append(
                f"{path}: {found['share']:.2%} of {found['probes']} probes answered, longest gap "
                f"{found['longest_gap_s']:.1f} s, median {found['median_s'] * 1000:.0f} ms, p99 {found['p99_s']:.2f} s"
            )
        lines += ["", f"{'process':<16}{'most MiB':>9}{'files':>7}{'MiB/h':>15}{'files/h':>15}{'seen s':>8}"]
        for kind, (size, files) in sorted(self.most.items()):
            line = f"{kind:<16}{size / 2**20:>9.0f}{files:>7}"
            if (one := self.growth.get(kind)) is not None:
                memory = f"{one.bytes_per_hour / 2**20:.1f} ± {one.bytes_error / 2**19:.1f}"
                opened = f"{one.files_per_hour:.1f} ± {2 * one.files_error:.1f}"
                line += f"{memory:>15}{opened:>15}{one.span:>8.0f}"
            lines.append(line)
        lines += ["", f"{len(self.problems)} problems", *(f"- {problem}" for problem in self.problems[:_LISTED])]
        return "\n".join(lines) + "\n"


def _spread(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)], 2)

    return {"count": len(ordered), "median_s": at(0.5), "p95_s": at(0.95), "most_s": at(1.0)}


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"

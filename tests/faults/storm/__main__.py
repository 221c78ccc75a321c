"""
A long storm over a whole installation.

    python -m tests.faults.storm --hours 8 --seed 1 --report storm.json
    python -m tests.faults.storm --hours 0.2 --kills 30 --only kill freeze

Exits with 0 when nothing was violated, and with 1 otherwise. The report is printed, and written as JSON.
As root it uses a disk of memory of its own, so that it can be filled; with a C compiler it steps the clock of programs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults.conftest import assert_nothing_left
from tests.faults.storm.storm import StormPlan, run

#: The calm work at the end, as a share of the storm; in seconds at least and at most.
_CALM, _CALM_LEAST, _CALM_MOST = 0.1, 180.0, 1800.0


def main(arguments: Sequence[str]) -> int:
    """Run a storm, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.storm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=1.0, help="of faults; calm work and the checks follow")
    parser.add_argument("--kills", type=int, default=10**9, help="ends after so many faults, if the hours are not over")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--calm", type=float, help="seconds of calm work at the end; a tenth of the hours, 3 to 30 min")
    parser.add_argument("--only", nargs="*", default=[], help="faults whose name begins so, such as `kill` or `disk`")
    parser.add_argument("--report", type=Path, help="a file for the report as JSON")
    given = parser.parse_args(arguments)
    seconds = 3600 * given.hours
    calm = given.calm if given.calm is not None else min(max(_CALM * seconds, _CALM_LEAST), _CALM_MOST)
    root, began = Path(tempfile.mkdtemp(prefix="storm")), time.monotonic()
    root.chmod(0o711)

    def show(line: str) -> None:
        sys.stderr.write(f"{time.monotonic() - began:8.1f} {line}\n")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        report = run(root / "site", StormPlan(seconds, given.kills, given.seed, calm, only=tuple(given.only)), show)
    finally:
        assert_nothing_left(root)
        shutil.rmtree(root, ignore_errors=True)
    sys.stdout.write(report.text())
    if given.report is not None:
        given.report.write_text(json.dumps(report.as_json(), indent=2) + "\n")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

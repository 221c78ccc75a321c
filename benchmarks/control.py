"""
Arriero's control worker as benchmarks want it: `python -m benchmarks.control NAME [--by-message] [--stamps FILE]`.

The product's own worker goes on with a short step that follows on its queue without a message in between. Steps that
ask a model never do; what such a hop costs is seen with `--by-message`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from app.workflows.runs.changes import change
from benchmarks.stamps import Stamps
from workers import programs, step_kinds


def stamp(file: Path) -> None:
    """Write down when the work of each step begins and ends."""
    stamps, execute = Stamps(file), step_kinds.execute

    def stamped(task: step_kinds.StepTask) -> Any:
        began = time.time()
        done = execute(task)
        stamps.add(f"{task.claim.run_id}/{task.claim.key}", began, time.time())
        return done

    step_kinds.execute = stamped


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--by-message", action="store_true")
    parser.add_argument("--stamps", type=Path)
    asked = parser.parse_args()
    if asked.by_message:
        change.SHORT = frozenset()
    if asked.stamps:
        stamp(asked.stamps)
    sys.exit(programs.main(["control", asked.name]))

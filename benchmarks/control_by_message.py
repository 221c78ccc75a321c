"""
Arriero's control worker, but with a message for every step: `python -m benchmarks.control_by_message NAME`.

The product's own worker goes on with a short step that follows on its queue without a message in between. Steps that
ask a model never do; what such a hop costs is seen here.
"""

from __future__ import annotations

import sys

from app.workflows import change
from workers import programs

if __name__ == "__main__":
    change.SHORT = frozenset()
    sys.exit(programs.main(["control", *sys.argv[1:]]))

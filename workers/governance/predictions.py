"""The job of predictions: it learns of the runs that have ended."""

from __future__ import annotations

from collections.abc import Mapping

from app.inference.prediction import learning
from workers.passes import time_limit
from workers.runtime import Runtime

#: Most seconds of one pass.
_SECONDS = 3.0


def run_predictions(runtime: Runtime) -> Mapping[str, object] | None:
    """Learn of ended runs: see `app.inference.prediction`."""
    learned = learning.learn_ended(runtime.runs.database, time_limit(_SECONDS))
    return {"runs": learned} if learned else None

"""Clusters vectors in a child process of low priority, which is killed when it takes too long."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta

from app.kernel.errors import Unavailable

_PROGRAM = "workers.memory.consolidation.clustering"
_MISSING = "scikit-learn is not installed on this host: pip install 'arriero[consolidation]'"


def cluster(groups: Sequence[Sequence[str]], smallest: int, timeout: timedelta) -> Sequence[Sequence[Sequence[int]]]:
    """
    Return the clusters of each group of vectors; see `Clusterer`.

    Raises Unavailable when scikit-learn is not installed or the child ends without an answer.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise Unavailable(_MISSING)
    lists = ", ".join(f"[{', '.join(vectors)}]" for vectors in groups)
    request = f'{{"smallest": {smallest}, "groups": [{lists}]}}'
    arguments = [sys.executable, "-m", _PROGRAM]
    seconds = timeout.total_seconds()
    try:
        done = subprocess.run(
            arguments,
            input=request,
            capture_output=True,
            text=True,
            timeout=seconds,
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"clustering took more than {seconds:g} s (setting consolidation.cluster_timeout)") from None
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with {done.returncode}"]
        raise Unavailable(f"clustering failed: {last[0][:300]}")
    found: Sequence[Sequence[Sequence[int]]] = json.loads(done.stdout)
    return found

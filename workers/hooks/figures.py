"""What hooks did in this process: calls and seconds, by hook, point and result."""

from __future__ import annotations

import threading

from app.inference.model_metrics.latency import Latencies


class HookFigures:
    """The counters. Hooks are those of the settings, so their names are few."""

    def __init__(self) -> None:
        """Nothing was called."""
        self._lock = threading.Lock()
        self._calls: dict[tuple[str, str, str], int] = {}
        self._durations: dict[tuple[str, str], Latencies] = {}

    def count(self, hook: str, at: str, result: str, seconds: float) -> None:
        """Count a call."""
        with self._lock:
            self._calls[hook, at, result] = self._calls.get((hook, at, result), 0) + 1
            self._durations.setdefault((hook, at), Latencies()).add(seconds)

    def totals(self) -> tuple[dict[tuple[str, str, str], int], dict[tuple[str, str], Latencies]]:
        """The calls by hook, point and result, and their durations by hook and point."""
        with self._lock:
            durations = {key: Latencies() for key in self._durations}
            for key, found in self._durations.items():
                durations[key].merge(found)
            return dict(self._calls), durations

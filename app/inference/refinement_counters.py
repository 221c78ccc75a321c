"""
Counters of refined outputs: how many passed before and after, how many flipped, and what that cost.

Redis keys:
    arriero:refinements   hash: `counter|kind|label` to a count

They count what has ended, at least once: a worker that dies between counting and recording counts again. With a lost
Redis they begin at zero, as counters of Prometheus may.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import redis

from app.kernel import broker, log

_log = log.get(__name__)

_KEY = "arriero:refinements"
#: By counter, its description and what its second label says.
COUNTERS: Mapping[str, tuple[str, str]] = {
    "items": ("Outputs that refine, ensemble and verify steps have returned.", "verification"),
    "passed": ("Outputs that passed their verifiers: the first drafts, and the returned ones.", "when"),
    "flips": ("Outputs whose first draft failed and that passed in the end, and the reverse.", "direction"),
    "checks": ("Single checks that the returned output mended, and that it broke.", "change"),
    "tokens": ("Tokens of first drafts, and of all that followed them.", "part"),
    "rounds": ("Generations that were judged: kept or not.", "kept"),
}
#: By counter: kind, value of the second label, count.
RefinementCounts = Mapping[str, list[tuple[str, str, int]]]


def increments(kind: str, report: Mapping[str, Any]) -> dict[str, int]:
    """Return what the report of an output adds to the counters, by `counter|kind|label`."""
    gain, tokens = report["gain"], report["tokens"]
    found = {
        ("items", str(report["verification"])): 1,
        ("passed", "before"): int(gain["before"]["passed"] is True),
        ("passed", "after"): int(gain["after"]["passed"] is True),
        ("flips", "wrong_to_right"): gain["wrong_to_right"],
        ("flips", "right_to_wrong"): gain["right_to_wrong"],
        ("checks", "mended"): gain["checks_mended"],
        ("checks", "broken"): gain["checks_broken"],
        ("tokens", "draft"): tokens["draft"],
        ("tokens", "after_draft"): tokens["after_draft"],
        ("rounds", "true"): sum(1 for one in report["rounds"] if one["kept"]),
        ("rounds", "false"): sum(1 for one in report["rounds"] if not one["kept"]),
    }
    return {f"{counter}|{kind}|{label}": int(count) for (counter, label), count in found.items()}


def read(client: redis.Redis) -> RefinementCounts:
    """Return all counters. Raises redis.RedisError."""
    found: dict[str, list[tuple[str, str, int]]] = {}
    content: Any = client.hgetall(_KEY)
    for name, value in sorted(content.items()):
        counter, _, rest = name.decode("utf-8", "replace").partition("|")
        kind, _, label = rest.partition("|")
        if counter in COUNTERS and value.isdigit():
            found.setdefault(counter, []).append((kind, label, int(value)))
    return found


class RefinementCounters:
    """The counters as a control worker writes them. While Redis does not answer, nothing is counted."""

    def __init__(self, redis_url: str) -> None:
        """Does not connect."""
        self._redis = broker.connect(redis_url)

    def count(self, kind: str, report: Mapping[str, Any]) -> None:
        """Count an output that is done."""
        try:
            with self._redis.pipeline(transaction=True) as pipeline:
                for name, count in increments(kind, report).items():
                    pipeline.hincrby(_KEY, name, count)
                pipeline.execute()
        except redis.RedisError as error:
            _log.warning("refinement_not_counted", error=str(error))

    def close(self) -> None:
        """Close the connection."""
        self._redis.close()

"""
The jobs of signals and rules: reading and evaluation, and roll-ups.

What cannot be read stops no evaluation, and a rule that fails stops no other one: both are logged with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psycopg
import redis

from app.governance.rules import service, store
from app.governance.rules.evaluator import RuleEvaluator
from app.governance.rules.firing import FiringState
from app.governance.rules.rule import Rule
from app.governance.rules.service import RuleService
from app.governance.signals import rollup
from app.governance.signals.cache_calls import cache_calls
from app.governance.signals.readers import BATCH, Readers
from app.kernel import addresses, log
from app.kernel.broker import connect
from app.kernel.errors import ArrieroError, DatabaseUnreachable, InvalidInput
from workers.governance.firing_hooks import hooks_of
from workers.passes import time_limit
from workers.runtime import Runtime

_log = log.get(__name__)

#: Most seconds for reading in one pass, and for roll-ups.
_READ_SECONDS, _ROLL_UP_SECONDS = 5.0, 20.0
#: A break of so many intervals counts for no condition.
_LONGEST_BREAK = 6
#: Firings that are removed in one pass.
_REMOVED = 5_000

#: The files with rules, as they were read last, by path: when they were changed, and their rules.
_files: dict[Path, tuple[int, list[Rule]]] = {}
#: What was wrong with the files when that was logged last; empty: nothing.
_refused: list[str] = []


def run_evaluation(runtime: Runtime) -> Mapping[str, object] | None:
    """Read signals, and evaluate all rules. Raises Unavailable."""
    database, settings = runtime.runs.database, runtime.settings
    in_time = time_limit(_READ_SECONDS)
    _read(Readers(database, settings.fleet.agent_lease), addresses.of(settings).redis_url, in_time)
    service.ensure_builtin(database)
    apply_files(RuleService(database, settings.rules.max_rules), settings.rules.files)
    evaluator = RuleEvaluator(database, hooks_of(runtime), settings.rules.evaluate_every * _LONGEST_BREAK)
    counts = evaluate(evaluator)
    if any(counts.values()):
        runtime.activity.note()
    return counts if any(counts.values()) else None


def evaluate(evaluator: RuleEvaluator) -> dict[str, int]:
    """Evaluate all rules, and make every transition. Returns how many began to fire, were cleared, and failed."""
    counts = {"fired": 0, "cleared": 0, "failed": 0}
    for transition in evaluator.decide_all():
        try:
            firing = evaluator.apply(transition)
        except DatabaseUnreachable:
            raise
        except Exception:  # noqa: BLE001 the outermost loop over rules: the others are evaluated
            _log.exception("rule_not_applied", rule=transition.stored and transition.stored.name)
            counts["failed"] += 1
            continue
        if firing is None:
            continue
        fired = firing.state is FiringState.FIRING
        counts["fired" if fired else "cleared"] += 1
        _log.info(
            "rule_fired" if fired else "rule_cleared",
            rule=firing.rule.rule,
            firing_id=str(firing.id),
            labels=dict(firing.labels),
            dry_run=firing.dry_run,
            reason=firing.reason if fired else firing.cleared_reason,
        )
    return counts


def run_roll_up(runtime: Runtime) -> Mapping[str, object] | None:
    """Roll up signals, and remove what is past its retention. Raises Unavailable."""
    database = runtime.runs.database
    done = rollup.roll_up(database, time_limit(_ROLL_UP_SECONDS))
    with database.work() as work:
        firings = store.remove_firings(work, runtime.settings.rules.keep_firings, _REMOVED)
    found = {"hours": done.hours, "days": done.days, "removed": done.removed, "firings": firings}
    return found if any(found.values()) else None


def _read(readers: Readers, redis_url: str, in_time: Callable[[], bool]) -> None:
    def attempts() -> None:
        while readers.attempts() >= BATCH and in_time():
            pass

    def cache() -> None:
        client = connect(redis_url)
        try:
            readers.cache(cache_calls(client))
        finally:
            client.close()

    for read in (attempts, readers.pools, readers.called_runs, readers.conversations, readers.states, cache):
        try:
            read()
        except DatabaseUnreachable:
            raise
        except (psycopg.Error, redis.RedisError, ArrieroError) as error:
            _log.warning("signals_not_read", reader=read.__name__, error=str(error))


def apply_files(rules: RuleService, paths: Sequence[Path]) -> None:
    """
    Store the rules of the files that have changed. While one is invalid, nothing of any file changes.

    What is wrong is logged when it changes, and not in each pass.
    """
    try:
        for path in paths:
            changed = path.stat().st_mtime_ns
            if _files.get(path, (0, []))[0] != changed:
                _files[path] = (changed, service.read_file(rules, path))
    except (OSError, UnicodeDecodeError, InvalidInput) as error:
        if _refused != [str(error)]:
            _refused[:] = [str(error)]
            _log.error("rule_file_invalid", error=str(error))
        return
    _refused.clear()
    found: dict[str, Rule] = {rule.rule: rule for path in paths for rule in _files[path][1]}
    service.apply_files(rules, found, "files")

"""
The worker programs: `python -m workers.programs control NAME [INCARNATION] | beat | agent | pool ID EPOCH | flower`.

`arriero control`, `arriero beat`, `arriero agent` and `arriero flower` become these, with their settings in the
environment. An agent starts the pools that were granted to its host.

Each loads its own modules and no other's: an agent holds no engine, and what starts again is soon there.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from app.kernel import addresses, log, settings
from app.kernel.broker import CONTROL_QUEUE, IO_QUEUE
from app.kernel.errors import ArrieroError
from app.kernel.settings import Settings

_log = log.get(__name__)

#: The scheduler of beat, by its place.
SCHEDULER = "workers.messaging.beat:Scheduler"
#: Exit code of a program that could not start.
NOT_STARTED = 5


def main(arguments: Sequence[str]) -> int:
    """Run the named program; gives its exit code."""
    loaded = settings.load().settings
    log.configure(loaded.log)
    try:
        match arguments:
            case ["control", name]:
                return control(loaded, name)
            case ["control", name, incarnation]:
                return control(loaded, name, incarnation)
            case ["beat"]:
                return beat(loaded)
            case ["agent"]:
                return int(_of("workers.agent.agent", "Agent")(loaded).run())
            case ["pool", id_, epoch] if epoch.isdigit():
                return int(_of("workers.pool.pool", "run")(loaded, id_, int(epoch)))
            case ["flower"]:
                return int(_of("workers.flower", "run")(loaded))
            case _:
                print(__doc__, file=sys.stderr)  # noqa: T201 the usage, for whoever calls it by hand
                return 2
    except ArrieroError as error:
        _log.error("program_not_started", program=arguments[0], error=str(error))
        return NOT_STARTED


def control(loaded: Settings, name: str, incarnation: str | None = None) -> int:
    """Do scheduled jobs, and steps that need no model. `incarnation` is its parent's name for this process alone."""
    application = _of("workers.application", "Application")(loaded)
    return int(application.serve(name, [CONTROL_QUEUE, IO_QUEUE], loaded.control.concurrency, incarnation=incarnation))


def beat(loaded: Settings) -> int:
    """Send the scheduled jobs. The lock of RedBeat lets one of several do it."""
    celery = _of("app.kernel.broker", "celery_app")(
        addresses.of(loaded).redis_url, loaded.broker, _of("workers.messaging.timetable", "schedule")(loaded)
    )
    level = loaded.log.level.upper()
    beat = _of("celery.apps.beat", "Beat")
    beat(app=celery, quiet=True, loglevel=level, redirect_stdouts=False, scheduler_cls=SCHEDULER).run()
    return 0


def _of(module: str, name: str) -> Callable[..., Any]:
    """What the program is made of, loaded now."""
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

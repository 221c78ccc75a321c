"""
The worker programs: `python -m workers.programs control NAME | beat | agent | pool ID EPOCH`.

`arriero control`, `arriero beat` and `arriero agent` become these, with their settings in the environment. An agent
starts the pools that were granted to its host.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from celery.apps.beat import Beat

from app.kernel import log, settings
from app.kernel.broker import CONTROL_QUEUE, IO_QUEUE
from app.kernel.errors import ArrieroError
from app.kernel.settings import Settings
from workers import pool
from workers.agent import Agent
from workers.application import Application

_log = log.get(__name__)

#: The scheduler of beat, by its place.
SCHEDULER = "workers.beat:Scheduler"
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
            case ["beat"]:
                return beat(loaded)
            case ["agent"]:
                return Agent(loaded).run()
            case ["pool", id_, epoch] if epoch.isdigit():
                return pool.run(loaded, id_, int(epoch))
            case _:
                print(__doc__, file=sys.stderr)  # noqa: T201 the usage, for whoever calls it by hand
                return 2
    except ArrieroError as error:
        _log.error("program_not_started", program=arguments[0], error=str(error))
        return NOT_STARTED


def control(loaded: Settings, name: str) -> int:
    """Do scheduled jobs, and steps that need no model."""
    return Application(loaded).serve(name, [CONTROL_QUEUE, IO_QUEUE], loaded.control.concurrency)


def beat(loaded: Settings) -> int:
    """Send the scheduled jobs. The lock of RedBeat lets one of several do it."""
    application = Application(loaded)
    level = loaded.log.level.upper()
    Beat(app=application.celery, quiet=True, loglevel=level, redirect_stdouts=False, scheduler_cls=SCHEDULER).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

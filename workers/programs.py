"""
The worker programs:
`python -m workers.programs control NAME [--beat] [INCARNATION] | beat | agent | pool ID EPOCH | flower [DESCRIPTOR]`,
`llama`, `gpus` or `self-test`.

`arriero control`, `arriero beat`, `arriero agent` and `arriero flower` replace themselves by these programs, with their
settings in the environment. An agent starts the pools of its host.

Each program imports only its own modules: an agent has no engine, and restarts are quick.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

from app.kernel import addresses, log, settings, tracing
from app.kernel.broker import CONTROL_QUEUE, IO_QUEUE
from app.kernel.errors import ArrieroError, Unavailable
from app.kernel.settings import Settings

_log = log.get(__name__)

#: The import path of beat's scheduler.
SCHEDULER = "workers.messaging.beat:Scheduler"
#: Connections to the database for the threads of mail.
_MAIL_CONNECTIONS = 4
#: Exit code of a program that could not start.
NOT_STARTED = 5


def main(arguments: Sequence[str]) -> int:
    """Run the named program. Returns its exit code."""
    if arguments == ["gpus"]:
        return int(_imported("workers.engine.bindings.visible", "print_gpus")())
    if arguments == ["llama"]:
        return int(_imported("workers.engine.bindings.build", "print_build")())
    if arguments == ["self-test"]:
        return int(_imported("workers.engine.self_test", "print_self_test")())
    loaded = settings.load().settings
    log.configure(loaded.log)
    try:
        if arguments and arguments[0] in ("control", "pool"):
            tracing.start(loaded, arguments[0])
        match arguments:
            case ["control", name, "--beat", *incarnation] if len(incarnation) < 2:
                return control(loaded, name, *incarnation, beat=True)
            case ["control", name, *incarnation] if len(incarnation) < 2:
                return control(loaded, name, *incarnation)
            case ["beat"]:
                return beat(loaded)
            case ["agent"]:
                return int(_imported("workers.agent.agent", "Agent")(loaded).run())
            case ["agent", descriptor] if descriptor.isdigit():
                return int(_imported("workers.agent.agent", "Agent")(loaded, int(descriptor)).run())
            case ["pool", id_, epoch, *_] if epoch.isdigit():
                return int(_imported("workers.pool.pool", "run")(loaded, id_, int(epoch)))
            case ["flower"]:
                return int(_imported("workers.flower", "run")(loaded))
            case ["flower", descriptor] if descriptor.isdigit():
                return int(_imported("workers.flower", "run")(loaded, int(descriptor)))
            case _:
                print(__doc__, file=sys.stderr)  # noqa: T201 the usage, for a call by hand
                return 2
    except ArrieroError as error:
        _log.error("program_not_started", program=arguments[0], error=str(error))
        return NOT_STARTED


def control(loaded: Settings, name: str, incarnation: str | None = None, *, beat: bool = False) -> int:
    """
    Run scheduled jobs, and steps without a model. `incarnation` is an id of this process alone, from its parent.

    With `beat`, a thread triggers the jobs too, so that one machine needs no process for that.
    """
    threads, queues = loaded.control.concurrency, [CONTROL_QUEUE, IO_QUEUE]
    watched = _mail_of(loaded)
    connections = threads + 1 + (0 if watched is None else _MAIL_CONNECTIONS)
    resources = _imported("workers.runtime", "Resources").open(loaded, lambda _: connections)
    try:
        application = _imported("workers.application", "Application")(loaded)
        live = _imported("workers.governance.live_jobs", "LiveJobs")(
            loaded, resources.database, addresses.of(loaded).redis_url
        )
        application.follow(live)
        exported = _imported("workers.telemetry.exporter", "of_control_worker")(name, loaded)
        ticking = _imported("workers.messaging.beat", "running")(application.celery) if beat else nullcontext()
        with live.running(), exported as collector, ticking, ExitStack() as mail:

            def begin(runtime: Any) -> None:
                collector.figures = runtime.figures
                if watched is not None:
                    mail.enter_context(watched(runtime).running())

            return int(application.serve(name, queues, threads, resources, incarnation=incarnation, on_start=begin))
    finally:
        resources.close()


def _mail_of(loaded: Settings) -> Any | None:
    """Return the type that watches mail; None where the settings name none. Raises Unavailable without its packages."""
    if not (loaded.mail.smtp_port or loaded.mail.imap_hosts):
        return None
    try:
        return _imported("workers.handoffs.mail.watching", "MailWatch")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise Unavailable(f"mail needs the package {package}: pip install 'arriero[mail]'") from None


def beat(loaded: Settings) -> int:
    """Send the scheduled jobs. RedBeat's lock elects one of several beats."""
    celery = _imported("app.kernel.broker", "celery_app")(
        addresses.of(loaded).redis_url, loaded.broker, _imported("workers.messaging.timetable", "schedule")(loaded)
    )
    database = _imported("app.kernel.database", "Database")(addresses.of(loaded).database_url, pool_size=1)
    live = _imported("workers.governance.live_jobs", "LiveJobs")(loaded, database, addresses.of(loaded).redis_url)
    _imported("workers.messaging.beat", "follow")(celery, live)
    level = loaded.log.level.upper()
    beat = _imported("celery.apps.beat", "Beat")
    with live.running():
        beat(app=celery, quiet=True, loglevel=level, redirect_stdouts=False, scheduler_cls=SCHEDULER).run()
    return 0


def _imported(module: str, name: str) -> Any:
    """Import a module now and return its attribute `name`."""
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""
Logging: one line per event, with a static name and with ids as keys.

Each program calls `configure` once at its start. The format is columns at a terminal and JSON lines elsewhere.
Lines of libraries (Celery, uvicorn, Alembic) pass through the same processors.
The outermost loop of a program binds the context (`run_id`, `step_id`, `attempt`) and clears it afterwards.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO

import structlog
from structlog.tracebacks import ExceptionDictTransformer

from app.kernel.sections.servers import LogSettings

#: Loggers of libraries whose `info` lines are dropped; their warnings are kept.
#: Celery's lines about each message (`trace`, `strategy`) repeat Arriero's lines about each step.
_QUIET = (
    "alembic",
    "amqp",
    "app.kernel.postgres.idle_pool",  # SQLAlchemy's lines about its own pool, under the name of the class
    "celery.app.trace",
    "celery.beat",
    "celery.redirected",
    "celery.worker.strategy",
    "httpx2",
    "httpcore2",
    "kombu",
    "redbeat",
    "tornado",
)


def configure(settings: LogSettings, stream: TextIO | None = None) -> None:
    """Write every log line to `stream` (standard error by default), in the format of the settings."""
    out = stream or sys.stderr
    columns = settings.format == "columns" or (settings.format == "auto" and out.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="%H:%M:%S.%f" if columns else "iso", utc=not columns),
        structlog.stdlib.ExtraAdder(),
    ]
    last: list[Any] = (
        [
            structlog.dev.ConsoleRenderer(
                colors=out.isatty(), pad_event_to=28, exception_formatter=structlog.dev.plain_traceback
            )
        ]
        if columns
        # Never with local variables: they contain passwords and the texts of users.
        else [
            structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False)),
            structlog.processors.JSONRenderer(default=str),
        ]
    )
    structlog.configure(
        processors=[*shared[:-1], structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    set_level(settings)
    logging.captureWarnings(capture=True)


def set_level(settings: LogSettings) -> None:
    """Drop lines below the level of the settings, from now on."""
    root = logging.getLogger()
    root.setLevel(settings.level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def get(name: str) -> structlog.stdlib.BoundLogger:
    """Return the logger of a module."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger

"""
Logs: what happened, once, with a static name; ids as keys.

`configure` is called by each program's shell, once. Columns at a terminal, JSON lines elsewhere.
Lines of libraries (Celery, uvicorn, Alembic) pass through the same processors.
Context (`run_id`, `step_id`, `attempt`) is bound by the shell that knows it, and cleared after.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO

import structlog
from structlog.tracebacks import ExceptionDictTransformer

from app.kernel.settings import LogSettings

#: Libraries whose information is noise here; their warnings still come through.
#: What Celery tells of each message (`trace`, `strategy`), our own lines tell of each step.
_QUIET = (
    "alembic",
    "amqp",
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
    """Send every log line to `stream` (standard error by default), in the form that the settings name."""
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
        # Never with the locals of frames: passwords and the texts of users are among them.
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
    root.setLevel(settings.level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(capture=True)


def get(name: str) -> structlog.stdlib.BoundLogger:
    """The logger of a module."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger

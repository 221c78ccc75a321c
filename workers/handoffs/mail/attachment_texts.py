"""
The texts of PDFs that came with mails, each read by a process of its own that is killed at its limits.

A PDF that cannot be read has a problem in the place of its text. Its message goes on in any case.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from concurrent.futures import CancelledError
from datetime import timedelta
from typing import Any

from app.files import storage
from app.handoffs.mail import intake, reading
from app.kernel import log
from app.kernel.errors import StepFailure
from app.kernel.security import texts
from workers.runtime import Runtime
from workers.tool_loop import python_tools

_log = log.get(__name__)

_TOOL = "mail_pdf_text"
_TIMEOUT, _MEMORY_MB = timedelta(seconds=20), 1_024
_MAX_PROBLEM = 300


def read_due(runtime: Runtime, in_time: Callable[[], bool]) -> int:
    """Read PDFs that wait while there is time. Returns how many. Raises Unavailable."""
    count = 0
    while in_time():
        with runtime.runs.database.work() as work:
            taken = intake.take(work)
        if taken is None:
            break
        text, problem = _text(runtime, taken)
        with runtime.runs.database.work() as work:
            intake.read(work, taken, text, problem)
        count += 1
    return count


def _text(runtime: Runtime, taken: Any) -> tuple[str, str]:
    """Return the text of an attachment, or why there is none."""
    if taken.takes > intake.MAX_TAKES:
        return "", f"{intake.MAX_TAKES} workers tried to read it, and none came to an end"
    content = b"".join(storage.parts(runtime.runs.database, taken.file_id))
    arguments, id_ = {"pdf": base64.b64encode(content).decode()}, f"{taken.message_id}-{taken.position}"
    try:
        found = python_tools.value(
            _TOOL, arguments, id_, on_stop=lambda _: None, timeout=_TIMEOUT, memory_mb=_MEMORY_MB
        )
    except StepFailure as failure:
        _log.info("mail_attachment_not_read", message_id=str(taken.message_id), reason=failure.message[:_MAX_PROBLEM])
        return "", texts.storable(failure.message, _MAX_PROBLEM)
    except CancelledError:
        return "", "the worker was stopped"
    return texts.storable(str(found))[: reading.MAX_ATTACHED_TEXT], ""

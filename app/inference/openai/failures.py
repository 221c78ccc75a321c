"""Failures in the form of OpenAI's API: the status and the document of each reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.kernel.errors import FailureReason

#: By the reason of a failure, its status and code. Others are the server's fault.
_FAILURES: Mapping[str, tuple[int, str | None]] = {
    FailureReason.INVALID_REQUEST: (400, None),
    FailureReason.TEMPLATE_ERROR: (400, None),
    FailureReason.CONTEXT_EXCEEDED: (400, "context_length_exceeded"),
    FailureReason.HOOK_REFUSED: (400, "hook_refused"),
    FailureReason.HOOK_FAILED: (503, "hook_failed"),
    FailureReason.TIMEOUT: (504, "timeout"),
    FailureReason.CANCELLED: (409, "cancelled"),
    FailureReason.HTTP_THROTTLED: (429, "rate_limit_exceeded"),
    FailureReason.HTTP_UNREACHABLE: (503, "http_unreachable"),
    FailureReason.WORKER_LOST: (503, "worker_lost"),
    FailureReason.WORKER_STOPPED: (503, "worker_stopped"),
}


def error_document(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return an error document."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def of_failure(reason: str, message: str) -> tuple[int, dict[str, Any]]:
    """Return status and document of a failure in a pool."""
    status, code = _FAILURES.get(reason, (500, reason or None))
    return status, error_document(message, status, code=code)

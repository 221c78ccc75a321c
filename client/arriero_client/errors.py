"""
The errors of the client.

    ClientError
    ├── ConnectionFailed      the server could not be reached, after all retries
    ├── TimedOut              something took longer than the caller allowed
    ├── RunFailed             a run that was waited for has failed, or was cancelled
    ├── InvalidAnswer         an answer does not have the requested form
    ├── NotAvailable          the server does not have what was asked for
    └── ApiError              the server refused the request; it carries status, title, detail and the single problems
        ├── InvalidRequest        400, 413, 415, 422
        ├── Unauthorized          401
        ├── Forbidden             403
        ├── NotFound              404
        ├── Conflict              409
        ├── RateLimited           429, after all retries
        └── ServerFailed          5xx
            └── ServerUnavailable     503, after all retries
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arriero_client.effects import Reply
    from arriero_client.results import Run


class ClientError(Exception):
    """An error of the client."""


class ConnectionFailed(ClientError):
    """The server could not be reached."""


class TimedOut(ClientError):
    """Something took longer than the caller allowed."""


class RunFailed(ClientError):
    """A run has failed, or was cancelled."""

    def __init__(self, run: Run) -> None:
        self.run = run
        reason = (run.error or {}).get("message") or f"it was {run.state}"
        super().__init__(f"run {run.id} of {run.workflow}: {reason}")


class InvalidAnswer(ClientError):
    """An answer does not have the requested form."""

    def __init__(self, message: str, text: str = "") -> None:
        #: What was answered.
        self.text = text
        super().__init__(message)


class NotAvailable(ClientError):
    """The server does not have what was asked for."""

    def __init__(self, feature: str, message: str) -> None:
        self.feature = feature
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class FieldProblem:
    """One problem of an input."""

    where: str
    message: str
    accepted: str = ""
    line: int | None = None


class ApiError(ClientError):
    """The server refused the request."""

    def __init__(
        self,
        status: int,
        title: str,
        detail: str,
        problems: tuple[FieldProblem, ...] = (),
        code: str | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
    ) -> None:
        self.status, self.title, self.detail, self.problems = status, title, detail, problems
        #: The code of an error in OpenAI's form.
        self.code = code
        #: Seconds after which the server wants the request again.
        self.retry_after = retry_after
        self.request_id = request_id
        super().__init__(f"{status} {title}: {detail}" if detail else f"{status} {title}")


class InvalidRequest(ApiError):
    """The request is invalid."""


class Unauthorized(ApiError):
    """There is no valid API key."""


class Forbidden(ApiError):
    """The API key may not do this."""


class NotFound(ApiError):
    """There is no such thing."""


class Conflict(ApiError):
    """The request contradicts the state of what it is for."""


class RateLimited(ApiError):
    """There were too many requests."""


class ServerFailed(ApiError):
    """The server failed."""


class ServerUnavailable(ServerFailed):
    """The server cannot answer now."""


_BY_STATUS: Mapping[int, type[ApiError]] = {
    **dict.fromkeys((400, 413, 415, 422), InvalidRequest),
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    429: RateLimited,
    503: ServerUnavailable,
}


def of_reply(reply: Reply) -> ApiError:
    """Return the error of an answer: problem details, an error in OpenAI's form, or any other text."""
    try:
        document: Any = json.loads(reply.content)
    except ValueError:
        document = reply.content.decode("utf-8", "replace")[:500]
    title, detail, code = "error", "", None
    problems: tuple[FieldProblem, ...] = ()
    if isinstance(document, dict) and isinstance(document.get("error"), dict):
        error = document["error"]
        title, detail = str(error.get("type") or "error"), str(error.get("message") or "")
        code = None if error.get("code") is None else str(error["code"])
        problems = (FieldProblem(str(error["param"]), detail),) if error.get("param") else ()
    elif isinstance(document, dict):
        title, detail = str(document.get("title") or "error"), str(document.get("detail") or "")
        listed = document.get("errors")
        problems = tuple(_problem(one) for one in listed if isinstance(one, dict)) if isinstance(listed, list) else ()
    else:
        detail = str(document)
    kind = _BY_STATUS.get(reply.status, ServerFailed if reply.status >= 500 else ApiError)
    return kind(
        reply.status, title, detail, problems, code, retry_after(reply.headers), reply.headers.get("x-request-id")
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of the header Retry-After; None without one that counts seconds."""
    value = headers.get("retry-after", "").strip()
    return float(value) if value.isascii() and value.isdigit() and len(value) < 8 else None


def _problem(found: Mapping[str, Any]) -> FieldProblem:
    line = found.get("line")
    return FieldProblem(
        str(found.get("where") or ""),
        str(found.get("message") or ""),
        str(found.get("accepted") or ""),
        line if isinstance(line, int) else None,
    )

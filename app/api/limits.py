"""Request limits: a body over the size limit, declared or not, too many headers, and a URL with NUL are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.error_forms import ErrorForms
from app.kernel.errors import ArrieroError, BodyTooLarge, InvalidInput, Problem

#: Most headers of a request.
MAX_HEADERS = 100
#: The setting with the limit of most bodies.
_SETTING = "api.max_body_bytes"


class TooManyHeaders(ArrieroError):
    """The request has too many headers."""

    def __init__(self, headers: int) -> None:
        super().__init__(f"the request has {headers} headers; accepted: at most {MAX_HEADERS}")


class BodyLimit:
    """
    ASGI middleware that refuses bodies over the limit of the moment, too many headers, and URLs with NUL.

    `longer` has the limits, with their settings, of paths whose endpoints store their bodies as they arrive.
    """

    def __init__(
        self,
        app: ASGIApp,
        errors: ErrorForms,
        limit: Callable[[], int],
        longer: Mapping[str, tuple[int, str]] | None = None,
    ) -> None:
        self._app, self._errors, self._limit, self._longer = app, errors, limit, longer or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and count the bytes of its body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if len(scope["headers"]) > MAX_HEADERS:
            await self._refuse(scope, receive, send, 431, TooManyHeaders(len(scope["headers"])))
            return
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            problem = Problem("url", "it contains the character NUL", "a URL without %00")
            await self._refuse(scope, receive, send, 422, InvalidInput([problem], "url"))
            return
        usual = (self._limit(), _SETTING)
        limit, setting = self._longer.get(scope["path"], usual) if scope["method"] == "POST" else usual
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            await self._refuse(scope, receive, send, 413, BodyTooLarge(limit, setting))
            return
        received, answered = 0, False

        async def counting_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise BodyTooLarge(limit, setting)
            return message

        async def noting_send(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self._app(scope, counting_receive, noting_send)
        except BodyTooLarge as error:
            if answered:
                raise
            await self._refuse(scope, receive, send, 413, error)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, status: int, error: ArrieroError) -> None:
        await self._errors.of_error(scope["path"], status, error)(scope, receive, send)

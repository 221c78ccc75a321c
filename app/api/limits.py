"""The limits on requests: more bytes of a body than allowed, declared or not, and NUL in an address are refused."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api import problems
from app.kernel.errors import BodyTooLarge, InvalidInput, Problem


class BodyLimit:
    """ASGI middleware that refuses bodies of more than `limit` bytes with 413, and addresses with NUL with 422."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting its body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            problem = Problem("address", "it holds the character NUL", "an address without %00")
            await problems.of_error(422, InvalidInput([problem], "address"))(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._limit:
            await problems.of_error(413, BodyTooLarge(self._limit))(scope, receive, send)
            return
        seen, begun = 0, False

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._limit:
                raise BodyTooLarge(self._limit)
            return message

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, counted, noted)
        except BodyTooLarge as error:
            if begun:
                raise
            await problems.of_error(413, error)(scope, receive, send)

"""
The two transports: they do the effects of operations, with and without asyncio.

They decide nothing: what is sent, when again, and what an answer means is in the operations.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2

from arriero_client.effects import (
    Clock,
    ConnectionLost,
    Effect,
    Emit,
    Open,
    Operation,
    Read,
    Reply,
    Request,
    Sleep,
    Together,
)
from arriero_client.errors import ClientError

T = TypeVar("T")

#: Seconds for a connection to be made.
_CONNECT = 10.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How a client reaches its server."""

    base_url: str
    headers: Mapping[str, str]
    #: Seconds for an answer to begin, and between two parts of it.
    timeout: float

    def arguments(self, request: Request) -> dict[str, Any]:
        """The arguments of httpx2 for a request."""
        found: dict[str, Any] = {
            "method": request.method,
            "url": self.base_url + request.path,
            "headers": {**self.headers, **request.headers},
            "timeout": httpx2.Timeout(request.timeout or self.timeout, connect=_CONNECT),
        }
        query = {name: value for name, value in request.query.items() if value is not None}
        if query:
            found["params"] = query
        if request.file is not None:
            found |= {"data": dict(request.form), "files": {"file": request.file}}
        elif request.body is not None:
            found["json"] = request.body
        return found


class SyncTransport:
    """Does the effects of operations, and blocks its thread while it does so. Safe for threads."""

    def __init__(self, settings: Settings, transport: httpx2.BaseTransport | None = None) -> None:
        self._settings = settings
        self._client = httpx2.Client(transport=transport)

    def run(self, operation: Operation[T]) -> T:
        """Do an operation, and return its result. Raises what it raises."""
        stream = self.iterate(operation)
        while True:
            try:
                next(stream)
            except StopIteration as end:
                result: T = end.value
                return result

    def iterate(self, operation: Operation[T]) -> Generator[Any, None, T]:
        """Do an operation, and yield what it emits. Closing the generator ends it."""
        opened: httpx2.Response | None = None
        pieces: Any = None
        answer: Any = None
        lost: ConnectionLost | None = None
        try:
            while True:
                try:
                    effect = _advance(operation, answer, lost)
                except StopIteration as end:
                    result: T = end.value
                    return result
                answer = lost = None
                try:
                    match effect:
                        case Emit():
                            yield effect.value
                        case Request():
                            answer = self._send(effect)
                        case Open():
                            if opened is not None:
                                opened.close()
                            began = time.monotonic()
                            opened = self._open(effect.request)
                            content = opened.read() if opened.status_code >= 400 else b""
                            pieces, answer = opened.iter_bytes(), _reply(opened, content, began)
                        case Read():
                            answer = next(pieces, None)
                        case Sleep():
                            time.sleep(effect.seconds)
                        case Clock():
                            answer = time.monotonic()
                        case Together():
                            answer = self._together(effect)
                except httpx2.TransportError as error:
                    lost = _lost(error)
        finally:
            operation.close()
            if opened is not None:
                opened.close()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _send(self, request: Request) -> Reply:
        began = time.monotonic()
        answer = self._client.request(**self._settings.arguments(request))
        return _reply(answer, answer.content, began)

    def _open(self, request: Request) -> httpx2.Response:
        return self._client.send(self._client.build_request(**self._settings.arguments(request)), stream=True)

    def _together(self, effect: Together) -> list[Any]:
        def one(make: Callable[[], Operation[Any]]) -> Any:
            try:
                return self.run(make())
            except ClientError as error:
                return error

        with ThreadPoolExecutor(effect.limit, "arriero-client") as threads:
            return list(threads.map(one, effect.operations))


class AsyncTransport:
    """Does the effects of operations on an event loop."""

    def __init__(self, settings: Settings, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        self._settings = settings
        self._client = httpx2.AsyncClient(transport=transport)

    async def run(self, operation: Operation[T]) -> T:
        """Do an operation, and return its result. Raises what it raises."""
        results: list[T] = []
        async for _ in self._iterate(operation, results.append):
            pass
        return results[0]

    def iterate(self, operation: Operation[T]) -> AsyncGenerator[Any, None]:
        """Do an operation, and yield what it emits. Closing the generator ends it."""
        return self._iterate(operation, lambda _: None)

    async def _iterate(self, operation: Operation[T], on_result: Callable[[T], object]) -> AsyncGenerator[Any, None]:
        opened: httpx2.Response | None = None
        pieces: Any = None
        answer: Any = None
        lost: ConnectionLost | None = None
        try:
            while True:
                try:
                    effect = _advance(operation, answer, lost)
                except StopIteration as end:
                    on_result(end.value)
                    return
                answer = lost = None
                try:
                    match effect:
                        case Emit():
                            yield effect.value
                        case Request():
                            answer = await self._send(effect)
                        case Open():
                            if opened is not None:
                                await opened.aclose()
                            began = time.monotonic()
                            opened = await self._open(effect.request)
                            content = await opened.aread() if opened.status_code >= 400 else b""
                            pieces, answer = opened.aiter_bytes(), _reply(opened, content, began)
                        case Read():
                            answer = await anext(pieces, None)
                        case Sleep():
                            await asyncio.sleep(effect.seconds)
                        case Clock():
                            answer = time.monotonic()
                        case Together():
                            answer = await self._together(effect)
                except httpx2.TransportError as error:
                    lost = _lost(error)
        finally:
            operation.close()
            if opened is not None:
                await opened.aclose()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _send(self, request: Request) -> Reply:
        began = time.monotonic()
        answer = await self._client.request(**self._settings.arguments(request))
        return _reply(answer, answer.content, began)

    async def _open(self, request: Request) -> httpx2.Response:
        return await self._client.send(self._client.build_request(**self._settings.arguments(request)), stream=True)

    async def _together(self, effect: Together) -> list[Any]:
        limit = asyncio.Semaphore(effect.limit)

        async def one(make: Callable[[], Operation[Any]]) -> Any:
            async with limit:
                try:
                    return await self.run(make())
                except ClientError as error:
                    return error

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(make)) for make in effect.operations]
        return [task.result() for task in tasks]


def _advance(operation: Operation[Any], answer: Any, lost: ConnectionLost | None) -> Effect:
    """Give an operation the result of its effect, and return the next one. Raises StopIteration at its end."""
    return operation.send(answer) if lost is None else operation.throw(lost)


def _reply(answer: httpx2.Response, content: bytes, began: float) -> Reply:
    headers = {name.lower(): value for name, value in answer.headers.items()}
    return Reply(answer.status_code, headers, content, time.monotonic() - began)


def _lost(error: httpx2.TransportError) -> ConnectionLost:
    sent = not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout)
    timed_out = isinstance(error, httpx2.TimeoutException) and sent
    message = str(error) or type(error).__name__
    with suppress(RuntimeError):  # an error without a request
        message = f"{error.request.method} {error.request.url}: {message}"
    return ConnectionLost(message, sent=sent, timed_out=timed_out)

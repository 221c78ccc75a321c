"""The two clients: the same operations, with and without asyncio."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Self

import httpx2

from arriero_client.alerts import Alerts
from arriero_client.blocks import Blocks
from arriero_client.consolidations import Consolidating
from arriero_client.conversations import Conversations
from arriero_client.exchange import Retries
from arriero_client.files import Files
from arriero_client.health import Capable
from arriero_client.jobs import Jobs
from arriero_client.memories import Memories
from arriero_client.recall import Recalling
from arriero_client.rules import Rules
from arriero_client.runs import Runs
from arriero_client.transports import AsyncTransport, Settings, SyncTransport

#: The address of a server that `arriero up` has started on this machine.
LOCAL = "http://127.0.0.1:8470"
#: When requests are sent again.
RETRIES = Retries()
#: The variable with the API key.
KEY_VARIABLE = "ARRIERO_API__KEY"


class _Operations(Runs, Capable, Files, Blocks, Recalling, Conversations, Memories, Rules, Jobs, Alerts, Consolidating):
    """All operations, and what they need of a client."""

    def __init__(self, retries: Retries, model_timeout: float) -> None:
        self.retries, self.model_timeout = retries, model_timeout


class Client(_Operations):
    """
    A synchronous client. Safe for threads. Times are in seconds.

    `api_key` is by default that of the variable ARRIERO_API__KEY; servers without keys need none.
    """

    def __init__(
        self,
        base_url: str = LOCAL,
        *,
        api_key: str | None = None,
        timeout: float = 30.0,
        model_timeout: float = 600.0,
        retries: Retries = RETRIES,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        super().__init__(retries, model_timeout)
        self.transport = SyncTransport(_settings(base_url, api_key, timeout), transport)

    def close(self) -> None:
        """Close the connections."""
        self.transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class AsyncClient(_Operations):
    """
    A client for asyncio. Times are in seconds.

    `api_key` is by default that of the variable ARRIERO_API__KEY; servers without keys need none.
    """

    def __init__(
        self,
        base_url: str = LOCAL,
        *,
        api_key: str | None = None,
        timeout: float = 30.0,
        model_timeout: float = 600.0,
        retries: Retries = RETRIES,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(retries, model_timeout)
        self.transport = AsyncTransport(_settings(base_url, api_key, timeout), transport)

    async def close(self) -> None:
        """Close the connections."""
        await self.transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()


def _settings(base_url: str, api_key: str | None, timeout: float) -> Settings:
    if not base_url.startswith(("http://", "https://")):
        raise ValueError(f"{base_url!r} is no address; accepted: http://… or https://…")
    key = api_key or os.environ.get(KEY_VARIABLE)
    headers = {"User-Agent": "arriero-client", **({"Authorization": f"Bearer {key}"} if key else {})}
    return Settings(base_url.rstrip("/").removesuffix("/v1"), headers, timeout)

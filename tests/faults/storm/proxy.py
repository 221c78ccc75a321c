"""
A TCP proxy before a server, whose network can be cut.

`hang` forwards nothing and closes nothing, as a firewall that discards packets; `drop` resets all connections, and
each new one. What waits at the end of a hang is forwarded then, in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from enum import StrEnum

_CHUNK = 65_536
#: Closing sends a reset.
_RESET = struct.pack("ii", 1, 0)


class Network(StrEnum):
    """What the proxy does with connections."""

    UP = "up"
    HANG = "hang"
    DROP = "drop"


class Proxy:
    """A proxy on a port of loopback; its server's port is looked up at each connection."""

    def __init__(self, target: Callable[[], int]) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._network = Network.UP
        started = threading.Event()

        def serve() -> None:
            asyncio.set_event_loop(self._loop)
            self._server = self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", 0))
            self.port: int = self._server.sockets[0].getsockname()[1]
            started.set()
            self._loop.run_forever()
            # Connections that are still open end with the loop.
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.close()

        self._thread = threading.Thread(target=serve, name="proxy", daemon=True)
        self._thread.start()
        started.wait()

    @property
    def connections(self) -> int:
        """Open connections of clients."""
        return len(self._writers) // 2

    def set(self, network: Network) -> None:
        """Cut the network, or mend it."""
        self._loop.call_soon_threadsafe(self._set, network)

    def close(self) -> None:
        """End all connections, and stop."""
        self._loop.call_soon_threadsafe(self._stop)
        self._thread.join()

    def _stop(self) -> None:
        self._server.close()
        self._loop.stop()

    def _set(self, network: Network) -> None:
        self._network = network
        if network is Network.HANG:
            self._is_open.clear()
        else:
            self._is_open.set()
        if network is Network.DROP:
            for writer in list(self._writers):
                _reset(writer)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._is_open.wait()
        if self._network is Network.DROP:
            _reset(writer)
            return
        try:
            to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._target())
        except OSError:
            _reset(writer)
            return
        ends = {writer, to_writer}
        self._writers |= ends
        try:
            await asyncio.gather(self._pump(reader, to_writer), self._pump(to_reader, writer))
        except asyncio.CancelledError:
            return  # the proxy is closed; asyncio would report the connection
        finally:
            self._writers -= ends

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                await self._is_open.wait()
                writer.write(data)
                await writer.drain()
        await self._is_open.wait()
        with contextlib.suppress(OSError):
            writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        found = writer.get_extra_info("socket")
        if found is not None:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()

"""
Sharing: a thread of the agent that offers the model files of its host, and fetches those that it lacks.

A file is fetched from a host that offers it and is alive, and is here only when it has the SHA-256 that this host's own
catalogue names: no other host is believed. What was received is kept when a host fails; the next one sends the rest.
A host whose file was another one is not asked for it again for an hour.

Errors become sentences of the host for operators. Nothing here delays the agent, its heartbeats or its pools.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta

import httpx2
from pydantic import SecretStr

from app import __version__
from app.catalog import addressed, download, install
from app.catalog.addressed import AddressedFile
from app.catalog.catalog import Catalog, CatalogSource
from app.catalog.download import Download
from app.catalog.install import FileProgress, InstallState
from app.catalog.model import Model
from app.fleet import file_servers
from app.fleet.file_servers import FileServer
from app.kernel import log
from app.kernel.database import Database
from app.kernel.errors import DatabaseUnreachable, DownloadFailed, ModelFileUnusable, ServerNotStarted
from app.kernel.loop_guard import LoopGuard
from app.kernel.settings import Settings
from workers.peers.pace import Pace
from workers.peers.server import FileSender

_log = log.get(__name__)

_EVERY_MODEL = "*"
#: The key of the server's problem, beside the names of models.
_SERVER = ""
#: Time between two passes, and after which an unchanged offer is written again, in case its row is lost.
_PAUSE, _REWRITE = timedelta(seconds=10), timedelta(minutes=1)
#: Seconds for which a host is not asked again for a file that was another one there.
_WRONG = 3600.0
#: Attempts with one host before the next one is asked.
_ATTEMPTS = 2
#: Seconds to wait at the end for what goes on.
_END = 5.0


class Sharing:
    """What this host gives to others and takes from them. Without the settings `peers` it does nothing."""

    def __init__(
        self, settings: Settings, catalogs: CatalogSource, database: Database, pause: timedelta = _PAUSE
    ) -> None:
        """Do not start yet."""
        self._peers, self._data_dir, self._host = settings.peers, settings.data_dir, settings.fleet.host_here
        self._catalogs, self._database, self._pause = catalogs, database, pause.total_seconds()
        self._stopped = threading.Event()
        self._pace = Pace(self._peers.fetch_rate, self._stopped)
        self._guard = LoopGuard(DatabaseUnreachable, _Stopped)
        self._sender: FileSender | None = None
        #: What was last offered, and when.
        self._offered: tuple[FileServer, frozenset[str]] | None = None
        self._offered_at = float("-inf")
        #: By host and SHA-256, until when the host is not asked for the file.
        self._wrong: dict[tuple[str, str], float] = {}
        self._problems: dict[str, str] = {}
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)

    @property
    def problems(self) -> list[str]:
        """Sentences for people: why the server does not serve, and why files are not here."""
        return [reason for _, reason in sorted(self._problems.copy().items())]

    def start(self) -> None:
        """Offer and fetch from now on, once the host has joined."""
        if self._peers.serve or self._peers.models:
            self._thread.start()

    def close(self) -> None:
        """End. What was fetched so far is kept for the next start."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(_END)
        if self._sender is not None:
            self._sender.close()
            if self._offered is not None:
                with suppress(DatabaseUnreachable):
                    file_servers.remove(self._database, self._offered[0])

    def _run(self) -> None:
        while not self._stopped.is_set():
            with suppress(DatabaseUnreachable, _Stopped), self._guard.item("peers", self._host):
                self.run_pass()
            self._stopped.wait(self._pause)

    def run_pass(self) -> None:
        """Offer the files that are here, and fetch the missing ones. Raises DatabaseUnreachable."""
        catalog = self._catalogs.current()
        if self._peers.serve:
            with self._guard.item("file server", self._host):
                self._offer(catalog)
        wanted = list(self._wanted(catalog))
        for model in wanted:
            with self._guard.item("model", model.name) as failed:
                self._fetch(model)
            if failed:
                self._problems[model.name] = f"the files of {model.name} were not fetched: {failed[0]}"
        kept = {model.name for model in wanted} | {_SERVER, *self._peers.models}
        for name in self._problems.keys() - kept:
            del self._problems[name]

    def _offer(self, catalog: Catalog) -> None:
        if self._sender is None:
            try:
                self._sender = FileSender(self._peers)
            except ServerNotStarted as error:
                self._problems[_SERVER] = f"model files are not served to other hosts: {error}"
                return
            self._problems.pop(_SERVER, None)
            _log.info("model_files_served", url=self._sender.url)
        files = {file.sha256: file.path for model in catalog for file in addressed.here(model, self._data_dir)}
        self._sender.offered = files
        server = FileServer(self._host, self._sender.url, self._sender.certificate, self._sender.key)
        offer, now = (server, frozenset(files)), time.monotonic()
        if offer != self._offered or now - self._offered_at > _REWRITE.total_seconds():
            file_servers.put(self._database, server, files)
            self._offered, self._offered_at = offer, now

    def _wanted(self, catalog: Catalog) -> Iterator[Model]:
        if _EVERY_MODEL in self._peers.models:
            yield from catalog
            return
        for name in self._peers.models:
            if (model := catalog.find(name)) is None:
                self._problems[name] = f"peers.models names {name}, which the catalogue does not have"
            else:
                yield model

    def _fetch(self, model: Model) -> None:
        try:
            files = addressed.of(model, self._data_dir)
        except ModelFileUnusable as error:
            if model.name in self._peers.models:
                self._problems[model.name] = f"{model.name} cannot be fetched from other hosts: {error}"
            return
        for file in files:
            # One of another size is damaged, and nothing that this host may replace.
            if not file.path.exists() and (reason := self._fetch_file(model, file)):
                self._problems[model.name] = f"{file.path.name} of {model.name} is not here: {reason}"
                return
        self._problems.pop(model.name, None)

    def _fetch_file(self, model: Model, file: AddressedFile) -> str:
        """Fetch a file from the first host that can send it. Returns why none could; empty when it is here."""
        now = time.monotonic()
        self._wrong = {key: until for key, until in self._wrong.items() if until > now}
        offers = file_servers.offering(self._database, file.sha256, self._host)
        if not offers:
            return "no other host that is alive offers it"
        reasons = []
        for offer in offers:
            if (offer.host, file.sha256) in self._wrong:
                reasons.append(f"that of {offer.host} is another file")
            elif (error := self._fetch_from(offer, model, file)) is None:
                return ""
            else:
                reasons.append(f"{offer.host}: {error}")
        return "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more hosts" if len(reasons) > 3 else "")

    def _fetch_from(self, offer: FileServer, model: Model, file: AddressedFile) -> DownloadFailed | None:
        """Fetch a file from a host. Returns why it failed."""
        wanted = Download(
            url=f"{offer.url}/files/{file.sha256}",
            target=file.path,
            size=file.size,
            sha256=file.sha256,
            token=SecretStr(file_servers.token(offer.key, file.sha256)),
            refused="it has started again, or has the file no more",
        )
        begin, partial = time.monotonic(), install.partial_path(file.path)
        received = _Received(self._pace, self._stopped, partial.stat().st_size if partial.exists() else 0)
        told = _log.bind(model=model.name, file=file.path.name, host=offer.host)
        self._problems[model.name] = f"{file.path.name} of {model.name} is being fetched from {offer.host}"
        try:
            with install.lock(file.path, received), client_of(offer) as client:
                if file.path.exists():
                    return None
                download.fetch(wanted, received, sleep=self._sleep, attempts=_ATTEMPTS, client=client)
        except (DownloadFailed, OSError, ValueError) as error:
            if received.bytes and not partial.exists():
                self._wrong[offer.host, file.sha256] = time.monotonic() + _WRONG
            reason = error.strerror or error if isinstance(error, OSError) else error
            told.warning("model_file_not_fetched", bytes=received.bytes, error=str(reason))
            return error if isinstance(error, DownloadFailed) else DownloadFailed(str(reason))
        told.info("model_file_fetched", bytes=received.bytes, seconds=round(time.monotonic() - begin, 1))
        return None

    def _sleep(self, seconds: float) -> None:
        self._stopped.wait(seconds)


class _Stopped(Exception):
    """The agent ends in the middle of a transfer."""


class _Received:
    """Counts received bytes at their pace, and ends the transfer when the agent ends."""

    def __init__(self, pace: Pace, stopped: threading.Event, kept: int) -> None:
        self._pace, self._stopped, self._last = pace, stopped, kept
        self.bytes = 0

    def __call__(self, progress: FileProgress) -> None:
        if self._stopped.is_set():
            raise _Stopped
        if progress.state is not InstallState.DOWNLOADING:
            return
        new = progress.done - self._last if progress.done > self._last else progress.done
        self._last = progress.done
        self.bytes += new
        self._pace.spend(new)


def client_of(server: FileServer) -> httpx2.Client:
    """
    Return a client that trusts exactly this server, and follows no redirect and no proxy of the environment.

    Raises ValueError for a certificate that cannot be read.
    """
    verify: ssl.SSLContext | bool = True
    if server.certificate:
        verify = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # Only the holder of the certificate's key can answer, whatever name or signature the certificate has.
        verify.check_hostname = False
        verify.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        verify.load_verify_locations(cadata=server.certificate)
    return httpx2.Client(
        verify=verify,
        trust_env=False,
        follow_redirects=False,
        timeout=httpx2.Timeout(download.READ_TIMEOUT, connect=download.CONNECT_TIMEOUT),
        headers={"User-Agent": f"arriero/{__version__}", "Accept-Encoding": "identity"},
    )

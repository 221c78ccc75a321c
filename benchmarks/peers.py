"""
How fast a model file goes from host to host: `python -m benchmarks.peers [--mib 2048] [--rounds 3] [--json FILE]`.

A file goes over loopback in three ways, in turn, and each is verified by its SHA-256: by Arriero without and with TLS,
and by curl from Python's `http.server`, with `sha256sum` afterwards. Figures are medians in bytes per second.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pydantic import SecretStr

from app.catalog import download, install
from app.catalog.download import Download
from app.fleet import file_servers
from app.fleet.file_servers import FileServer
from app.kernel.sections.peers import PeerSettings
from tests.catalog.hostile_gguf import model as gguf_file
from tests.certificates import Authority
from workers.peers.server import FileSender
from workers.peers.sharing import client_of

_MIB = 1 << 20


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def by_arriero(source: Path, sha256: str, target: Path, peers: PeerSettings) -> float:
    """Send and fetch a file as agents do. Returns seconds."""
    sender = FileSender(peers)
    sender.offered = {sha256: source}
    server = FileServer("west", sender.url, sender.certificate, sender.key)
    wanted = Download(
        f"{sender.url}/files/{sha256}",
        target,
        source.stat().st_size,
        sha256,
        SecretStr(file_servers.token(sender.key, sha256)),
    )
    begin = time.perf_counter()
    with client_of(server) as client, install.lock(target, lambda _: None):
        download.fetch(wanted, lambda _: None, client=client)
    seconds = time.perf_counter() - begin
    sender.close()
    return seconds


def by_curl(source: Path, sha256: str, target: Path) -> float:
    """Fetch a file with curl from Python's server, and hash it. Returns seconds."""
    handler = functools.partial(_Quiet, directory=str(source.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{source.name}"
        begin = time.perf_counter()
        subprocess.run(["curl", "--silent", "--fail", "--noproxy", "*", "-o", target, url], check=True)
        found = subprocess.run(["sha256sum", target], check=True, capture_output=True, text=True).stdout
        seconds = time.perf_counter() - begin
        server.shutdown()
    assert found.startswith(sha256)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=2048, help="size of the file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        source = gguf_file(home / "m.gguf", data=options.mib * _MIB)
        with source.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        pem = Authority.create(home).issue("127.0.0.1")
        encrypted = PeerSettings(port=0, tls_certificate=pem, tls_key=pem)
        ways: dict[str, Callable[[Path], float]] = {
            "arriero": lambda target: by_arriero(source, sha256, target, PeerSettings(port=0)),
            "arriero_tls": lambda target: by_arriero(source, sha256, target, encrypted),
            "curl_and_sha256sum": lambda target: by_curl(source, sha256, target),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                target = home / name / "m.gguf"
                target.parent.mkdir()
                rates[name].append(source.stat().st_size / way(target))
                shutil.rmtree(target.parent)
    medians = {name: round(statistics.median(found)) for name, found in rates.items()}
    for name, rate in medians.items():
        print(f"{name:20} {rate / 1e6:8.0f} MB/s  {rate / medians['curl_and_sha256sum']:5.2f} x curl")
    if options.json:
        options.json.write_text(json.dumps(medians, indent=1) + "\n")


if __name__ == "__main__":
    main()

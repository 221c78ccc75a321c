"""Model files among hosts: real servers and transfers, with TLS, between hosts of one database."""

from __future__ import annotations

import datetime
import hashlib
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from structlog.testing import capture_logs

from app.catalog import addressed, catalog, files, install
from app.catalog.catalog import Catalog
from app.fleet import file_servers
from app.fleet.file_servers import FileServer
from app.fleet.hosts import Hosts
from app.kernel import settings
from app.kernel.database import Database
from app.kernel.errors import InvalidSettings
from app.kernel.sections.peers import PeerSettings
from tests.catalog.hostile_gguf import model as gguf_file
from tests.certificates import Authority
from tests.fleet.granting import LEASE
from workers.peers.server import FileSender
from workers.peers.sharing import Sharing

MIB = 1 << 20
ENTRY = '[[models]]\nname = "{name}"\nuse_cases = ["chat"]\nsource = {{ url = "http://127.0.0.1:9/{file}"{more} }}\n'


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """A complete model of about 3 MiB."""
    return gguf_file(tmp_path / "made.gguf", data=3 * MIB).read_bytes()


def entry(content: bytes, name: str = "m:1") -> str:
    digest = hashlib.sha256(content).hexdigest()
    return ENTRY.format(name=name, file=f"{name[0]}.gguf", more=f', sha256 = "{digest}", size = {len(content)}')


class Host:
    """A host that has joined, with what it shares."""

    def __init__(self, database: Database, home: Path, entries: str, **peers: Any) -> None:
        self.name, self.known = home.name, catalog.parse(entries, "catalog.toml")
        environment = {"ARRIERO_DATA_DIR": str(home), "ARRIERO_FLEET__HOST": home.name}
        found = settings.load(environment=environment).settings
        self.settings = found.model_copy(update={"peers": PeerSettings(**{"port": 0, **peers})})
        Hosts(database, LEASE, LEASE).join(self.name, self.name, 8, [], {})
        self.sharing = Sharing(self.settings, self.known, database)

    def path(self, model: str = "m:1") -> Path:
        return addressed.of(self.known.get(model), self.settings.data_dir)[0].path

    def put(self, content: bytes, model: str = "m:1") -> Path:
        path = self.path(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path


MakeHost = Callable[..., Host]


@pytest.fixture
def make_host(database: Database, tmp_path: Path) -> Iterator[MakeHost]:
    made: list[Host] = []

    def make(name: str, entries: str, **peers: Any) -> Host:
        made.append(Host(database, tmp_path / name, entries, **peers))
        return made[-1]

    yield make
    for host in made:
        host.sharing.close()


def test_a_missing_file_comes_from_another_host_over_tls(
    make_host: MakeHost, database: Database, content: bytes, tmp_path: Path
) -> None:
    # The key comes first in this file: it must go to nobody.
    file = Authority.create(tmp_path).issue("west.example.com")
    west = make_host("west", entry(content), serve=True, tls_certificate=file, tls_key=file)
    east = make_host("east", entry(content), models=["m:1"])
    east.sharing.run_pass()
    assert east.sharing.problems == ["m.gguf of m:1 is not here: no other host that is alive offers it"]

    west.put(content)
    west.sharing.run_pass()
    east.sharing.run_pass()

    assert east.path().read_bytes() == content
    assert east.sharing.problems == west.sharing.problems == []
    record = install.find_record(east.path())
    assert record is not None
    assert record.sha256 == hashlib.sha256(content).hexdigest()
    assert files.verify(east.known.get("m:1"), east.settings.data_dir)
    with database.work() as work:
        row = work.rows(text("SELECT url, certificate FROM file_server"))[0]
    assert row.url.startswith("https://127.0.0.1:")
    assert row.certificate.startswith("-----BEGIN CERTIFICATE-----")
    assert "KEY" not in row.certificate
    west.sharing.close()
    with database.work() as work:
        assert work.rows(text("SELECT url FROM file_server")) == [], "a host that ends offers nothing"


def test_another_certificate_than_that_of_the_database_is_not_believed(
    make_host: MakeHost, database: Database, content: bytes, tmp_path: Path
) -> None:
    authority = Authority.create(tmp_path)
    file = authority.issue("127.0.0.1")
    west = make_host("west", entry(content), serve=True, tls_certificate=file, tls_key=file)
    west.put(content)
    west.sharing.run_pass()
    with database.work() as work:
        other = file.with_name("other.pem")
        other.write_text(authority.issue("127.0.0.1").read_text())
        work.run(text("UPDATE file_server SET certificate = :other"), {"other": other.read_text()})
    east = make_host("east", entry(content), models=["m:1"])
    east.sharing.run_pass()
    assert not east.path().exists()
    assert "the certificate of 127.0.0.1" in east.sharing.problems[0]


def test_what_one_host_has_sent_is_continued_by_another(make_host: MakeHost, content: bytes) -> None:
    west = make_host("west", entry(content), serve=True)
    west.put(content)
    west.sharing.run_pass()
    east = make_host("east", entry(content), models=["*"])
    partial = install.partial_path(east.path())
    partial.parent.mkdir(parents=True)
    partial.write_bytes(content[: 2 * MIB])
    etag = f'"{hashlib.sha256(content).hexdigest()}"'
    told = {"url": "https://north:1/files/x", "etag": etag, "modified": "", "total": len(content), "linked_sha256": ""}
    partial.with_name(partial.name + ".json").write_text(json.dumps(told))
    with capture_logs() as logs:
        east.sharing.run_pass()
    assert east.path().read_bytes() == content
    fetched = [line for line in logs if line["event"] == "model_file_fetched"]
    assert [line["bytes"] for line in fetched] == [len(content) - 2 * MIB]


def test_a_host_with_another_content_is_found_out_and_not_asked_again(make_host: MakeHost, content: bytes) -> None:
    west = make_host("west", entry(content), serve=True)
    west.put(content[:-1] + b"x")
    west.sharing.run_pass()
    east = make_host("east", entry(content), models=["m:1"])
    east.sharing.run_pass()
    assert not east.path().exists()
    assert not install.partial_path(east.path()).exists()
    assert "the received file has the sha256" in east.sharing.problems[0]
    east.sharing.run_pass()
    assert east.sharing.problems == ["m.gguf of m:1 is not here: that of west is another file"]

    north = make_host("north", entry(content), serve=True)
    north.put(content)
    north.sharing.run_pass()
    east.sharing.run_pass()
    assert east.path().read_bytes() == content


def test_an_endless_answer_is_cut_off(make_host: MakeHost, database: Database, content: bytes) -> None:
    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65_536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            chunk = b"10000\r\n" + b"GGUF" + bytes(65_532) + b"\r\n"
            try:
                while True:
                    connection.sendall(chunk)
            except OSError:
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, daemon=True).start()
        east = make_host("east", entry(content), models=["m:1"])
        make_host("west", "")
        server = FileServer("west", f"http://127.0.0.1:{listener.getsockname()[1]}", "", "k")
        file_servers.put(database, server, [hashlib.sha256(content).hexdigest()])
        east.sharing.run_pass()
    assert f"sends more than the {len(content):,} bytes" in east.sharing.problems[0]
    assert list(east.path().parent.iterdir()) == []


def test_a_host_that_is_not_alive_is_not_asked(make_host: MakeHost, database: Database, content: bytes) -> None:
    west = make_host("west", entry(content), serve=True)
    west.put(content)
    west.sharing.run_pass()
    with database.work() as work:
        work.run(text("UPDATE host SET agent_until = now() - interval '1 second' WHERE name = 'west'"))
    east = make_host("east", entry(content), models=["m:1"])
    east.sharing.run_pass()
    assert "no other host that is alive" in east.sharing.problems[0]


def test_each_host_begins_with_another_server(make_host: MakeHost, database: Database) -> None:
    for number in range(8):
        make_host(f"h{number}", "")
        file_servers.put(database, FileServer(f"h{number}", "http://127.0.0.1:1", "", "k"), ["ab"])
    first = {file_servers.offering(database, "ab", f"client-{one}")[0].host for one in range(40)}
    assert len(first) >= 4


def test_only_what_is_offered_is_sent_and_only_for_its_token(tmp_path: Path, content: bytes) -> None:
    digest = hashlib.sha256(content).hexdigest()
    (tmp_path / "f").write_bytes(content)
    sender = FileSender(PeerSettings(port=0))
    sender.offered = {digest: tmp_path / "f", "b" * 64: tmp_path / "gone"}
    at = sender.url.removeprefix("http://")

    def ask(path: str, key: str = sender.key, method: str = "GET", of: str = digest, **headers: str) -> Any:
        connection = HTTPConnection(at, timeout=30)
        known = {"Authorization": f"Bearer {file_servers.token(key, of)}"} if key else {}
        connection.request(method, path, headers=known | {n.replace("_", "-"): v for n, v in headers.items()})
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer.status, body, answer.headers

    path = f"/files/{digest}"
    assert ask(path)[:2] == (200, content)
    assert ask(path, Range="bytes=100-")[:2] == (206, content[100:])
    assert ask(path, Range="bytes=100-", If_Range='"another"')[:2] == (200, content)
    assert ask(path, Range="bytes=0-5,9-")[0] == 200, "other ranges are not understood, which is allowed"
    assert ask(path, Range=f"bytes={len(content)}-")[0] == 416
    status, body, headers = ask(path, method="HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(content)))
    for refused in (
        ask(path, key=""),
        ask(path, key="guessed"),
        ask(path, of="b" * 64),
        ask("/files/../../etc/passwd"),
        ask(path + "/"),
        ask("/"),
    ):
        assert refused[:2] == (401, b"")
    assert ask(f"/files/{'c' * 64}", of="c" * 64)[0] == 404
    assert ask(f"/files/{'b' * 64}", of="b" * 64)[0] == 404, "it was removed since"
    assert ask(path, method="POST")[0] == 501
    sender.close()


def test_uploads_over_the_limit_are_turned_away(tmp_path: Path, content: bytes) -> None:
    digest = hashlib.sha256(content).hexdigest()
    (tmp_path / "f").write_bytes(content * 16)
    sender = FileSender(PeerSettings(port=0, uploads=1))
    sender.offered = {digest: tmp_path / "f"}
    request = (
        f"GET /files/{digest} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {file_servers.token(sender.key, digest)}"
    )
    host, port = sender.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as first, socket.create_connection((host, int(port))) as second:
        first.sendall(f"{request}\r\n\r\n".encode())
        assert first.recv(12) == b"HTTP/1.1 200"  # and reads no more: it holds the upload
        second.sendall(f"{request}\r\n\r\n".encode())
        answer = second.recv(4096)
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"Retry-After: 5" in answer
    sender.close()


def test_an_upload_keeps_its_rate(tmp_path: Path, content: bytes) -> None:
    digest = hashlib.sha256(content).hexdigest()
    (tmp_path / "f").write_bytes(content)
    sender = FileSender(PeerSettings(port=0, upload_rate="2MiB"))
    sender.offered = {digest: tmp_path / "f"}
    connection = HTTPConnection(sender.url.removeprefix("http://"), timeout=60)
    begin = datetime.datetime.now(datetime.UTC)
    connection.request(
        "GET", f"/files/{digest}", headers={"Authorization": f"Bearer {file_servers.token(sender.key, digest)}"}
    )
    assert connection.getresponse().read() == content
    connection.close()
    assert datetime.datetime.now(datetime.UTC) - begin > datetime.timedelta(seconds=1)
    sender.close()


def test_what_cannot_be_fetched_is_told(make_host: MakeHost) -> None:
    entries = ENTRY.format(name="m:1", file="m.gguf", more="")
    host = make_host("east", entries, models=["m:1", "n:1"])
    host.sharing.run_pass()
    unnamed, unknown = host.sharing.problems
    assert "m:1 cannot be fetched from other hosts: the catalogue names no sha256 of m.gguf" in unnamed
    assert unknown == "peers.models names n:1, which the catalogue does not have"
    every = make_host("north", entries, models=["*"])
    every.sharing.run_pass()
    assert every.sharing.problems == [], "`*` is what can be had"


def test_a_server_that_cannot_start_is_told_and_tried_again(make_host: MakeHost, content: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        west = make_host("west", entry(content), serve=True, port=holder.getsockname()[1])
        west.put(content)
        west.sharing.run_pass()
        assert "is in use by" in west.sharing.problems[0]
    west.sharing.run_pass()
    assert west.sharing.problems == []


def test_a_certificate_that_cannot_be_read_is_told(make_host: MakeHost, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    for name in ("bad.pem", "missing.pem"):
        path = tmp_path / name
        west = make_host("west", entry(content), serve=True, tls_certificate=path, tls_key=path)
        west.sharing.run_pass()
        assert f"peers.tls_certificate {path}" in west.sharing.problems[0]


def test_a_host_that_ends_stops_fetching_and_goes_on_later(make_host: MakeHost, content: bytes) -> None:
    west = make_host("west", entry(content), serve=True)
    west.put(content)
    west.sharing.run_pass()
    east = make_host("east", entry(content), models=["m:1"], fetch_rate="64KiB")
    east.sharing.start()
    partial = install.partial_path(east.path())
    pause = threading.Event()
    while not (partial.exists() and partial.stat().st_size):
        pause.wait(0.02)
    east.sharing.close()
    assert 0 < partial.stat().st_size < len(content)
    again = Sharing(
        east.settings.model_copy(update={"peers": PeerSettings(models=("m:1",))}), east.known, east.sharing._database
    )
    again.run_pass()
    assert east.path().read_bytes() == content


def test_split_files_and_their_adapters_are_one_model(make_host: MakeHost, content: bytes) -> None:
    digest, other = hashlib.sha256(content).hexdigest(), content[:-1] + b"y"
    entries = (
        '[[models]]\nname = "m:1"\nuse_cases = ["chat"]\n'
        f'source = {{ url = "http://127.0.0.1:9/m.gguf", sha256 = "{digest}", size = {len(content)} }}\n'
        '[models.engine]\nloras = [{ name = "a", source = { url = "http://127.0.0.1:9/a.gguf", '
        f'sha256 = "{hashlib.sha256(other).hexdigest()}", size = {len(other)} }} }}]\n'
    )
    west = make_host("west", entries, serve=True)
    for file, data in zip(addressed.of(west.known.get("m:1"), west.settings.data_dir), (content, other), strict=True):
        file.path.parent.mkdir(parents=True, exist_ok=True)
        file.path.write_bytes(data)
    west.sharing.run_pass()
    east = make_host("east", entries, models=["m:1"])
    east.sharing.run_pass()
    found = addressed.of(east.known.get("m:1"), east.settings.data_dir)
    assert [file.path.read_bytes() for file in found] == [content, other]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"host": "10.0.0.7"}, "it needs tls_certificate and tls_key"),
        ({"host": "0.0.0.0", "tls_certificate": "/c", "tls_key": "/k"}, "url must say by which one"),
        ({"url": "https://west:1"}, "url must begin with http://"),
        ({"url": "http://west:1", "tls_certificate": "/c", "tls_key": "/k"}, "url must begin with https://"),
        ({"tls_certificate": "/c"}, "belong together"),
        ({"url": "http://west:1/path"}, "peers.url"),
        ({"uploads": "0"}, "peers.uploads"),
        ({"upload_rate": "1"}, "peers.upload_rate"),
    ],
)
def test_settings_that_cannot_work_are_refused(given: dict[str, str], says: str) -> None:
    environment = {f"ARRIERO_PEERS__{name.upper()}": value for name, value in given.items()}
    with pytest.raises(InvalidSettings) as refused:
        settings.load(environment={"ARRIERO_PEERS__SERVE": "true", **environment})
    assert says in str(refused.value)


def test_the_catalogue_may_be_empty(make_host: MakeHost) -> None:
    host = make_host("west", "", serve=True, models=["*"])
    assert isinstance(host.known, Catalog)
    host.sharing.run_pass()
    assert host.sharing.problems == []


def test_a_client_that_speaks_no_tls_hinders_nobody(content: bytes, tmp_path: Path) -> None:
    file = Authority.create(tmp_path).issue("127.0.0.1")
    (tmp_path / "f").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    sender = FileSender(PeerSettings(port=0, tls_certificate=file, tls_key=file))
    sender.offered = {digest: tmp_path / "f"}
    host, port = sender.url.removeprefix("https://").split(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection((host, int(port))) as plain, socket.create_connection((host, int(port))) as silent:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with socket.create_connection((host, int(port))) as raw, context.wrap_socket(raw) as client:
            token = file_servers.token(sender.key, digest)
            client.sendall(f"GET /files/{digest} HTTP/1.1\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
            assert client.recv(12) == b"HTTP/1.1 200"
        assert silent.fileno() > 0
    sender.close()

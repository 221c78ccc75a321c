"""Tests of adding and removing models, with a server that answers as the Hugging Face hub does."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
from pydantic import SecretStr

from app.catalog import download, files, install
from app.catalog.live import LiveCatalog
from app.catalog.model import Model
from app.catalog.registration import hub, own_catalog, reference, removal, service
from app.catalog.registration.reference import HubReference
from app.catalog.registration.service import Registered, Wishes
from app.catalog.source import FileSource, HubSource
from app.kernel import settings as settings_module
from app.kernel.errors import (
    Conflict,
    DownloadFailed,
    InvalidCatalog,
    InvalidInput,
    ModelFileDamaged,
    ModelFileMissing,
)
from app.kernel.settings import Settings
from tests.catalog.conftest import Offer, Web

MakeGguf = Callable[..., Path]
COMMIT = "c" * 40
TOKEN = "hf_secret_token"


def chat_model(writer: gguf.GGUFWriter) -> None:
    writer.add_basename("Tiny-Llama")
    writer.add_size_label("1.1B")
    writer.add_context_length(2048)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}{{ enable_thinking }}")


class Hub:
    """The repository me/tiny on a server with the paths of the hub; files are redirected to another server."""

    def __init__(self, web: Web, cdn: Web) -> None:
        self.web, self.cdn = web, cdn
        self.api = "/api/models/me/tiny/revision/main?blobs=true"

    def offer(self, **contents: bytes) -> None:
        siblings: list[dict[str, Any]] = [{"rfilename": "README.md", "size": 12}]
        for name, content in contents.items():
            lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            siblings.append({"rfilename": name, "size": len(content), "lfs": lfs})
            headers = {
                "Location": f"{self.cdn.url}/{name}",
                "X-Linked-ETag": f'"{lfs["sha256"]}"',
                "X-Linked-Size": str(len(content)),
            }
            self.web.offers[f"/me/tiny/resolve/{COMMIT}/{name}"] = Offer(statuses=[302] * 20, headers=headers)
            self.cdn.offers[f"/{name}"] = Offer(content)
        body = json.dumps({"id": "me/tiny", "sha": COMMIT, "gated": False, "siblings": siblings})
        self.web.offers[self.api] = Offer(body.encode(), etag=None)


@pytest.fixture
def remote(start_web: Callable[[], Web]) -> Hub:
    return Hub(start_web(), start_web())


@pytest.fixture
def here(tmp_path: Path, remote: Hub) -> Settings:
    given = {
        "ARRIERO_DATA_DIR": str(tmp_path / "data"),
        "ARRIERO_CATALOG__HUB": remote.web.url,
        "ARRIERO_CATALOG__HUB_TOKEN": TOKEN,
    }
    return settings_module.load(environment=given).settings


def register(text: str, here: Settings, **wishes: Any) -> Registered:
    meant = reference.parse(text, here.catalog.hub)
    assert meant is not None
    return service.register(meant, text, here, lambda _: None, Wishes(**wishes))


def refused(text: str, here: Settings, **wishes: Any) -> str:
    with pytest.raises((DownloadFailed, InvalidInput, Conflict, ModelFileDamaged)) as caught:
        register(text, here, **wishes)
    assert TOKEN not in str(caught.value)
    assert not files.own_catalog(here.data_dir).exists()
    return str(caught.value)


def test_a_file_of_the_hub_gets_an_entry_from_its_header(remote: Hub, here: Settings, make_gguf: MakeGguf) -> None:
    content = make_gguf(setup=chat_model).read_bytes()
    remote.offer(**{"tiny-Q4_K_M.gguf": content, "tiny-Q8_0.gguf": b"other"})
    live = LiveCatalog(here)
    added = register("hf.co/me/tiny", here)

    assert added.added
    model = files.catalog_of(here).get("tiny-llama:1.1b")
    assert model == added.model == live.current().get("tiny-llama:1.1b"), "a running process sees it"
    sha256 = (hashlib.sha256(content).hexdigest(),)
    assert model.source == HubSource(
        hf="me/tiny", file="tiny-Q4_K_M.gguf", revision=COMMIT, size=(len(content),), sha256=sha256
    )
    assert (model.use_cases, model.context, model.slots) == (("chat",), 2048, 4)
    assert model.prompt.arguments == {"enable_thinking": False}
    assert files.check(model, here.data_dir).read_bytes() == content
    text = files.own_catalog(here.data_dir).read_text()
    assert text.startswith("# Models that")
    assert "# hf.co/me/tiny (F32, trained for 2048 tokens)\n[[models]]\nname = " in text
    assert TOKEN not in text
    authorised = ["authorization" in headers for _, headers in remote.web.requests]
    assert authorised == [True, True], "the token goes to the hub"
    assert all("authorization" not in headers for _, headers in remote.cdn.requests), "and to no other server"


def test_the_projector_of_a_repository_comes_with_the_model(remote: Hub, here: Settings, make_gguf: MakeGguf) -> None:
    projector = make_gguf("eyes.gguf", architecture="clip").read_bytes()
    remote.offer(
        **{
            "tiny-Q4_K_M.gguf": make_gguf(setup=chat_model).read_bytes(),
            "mmproj-tiny-F16.gguf": projector,
            "mmproj-tiny-F32.gguf": b"other",
        }
    )
    model = register("hf.co/me/tiny", here).model
    assert model == files.catalog_of(here).get(model.name)
    assert model.mmproj is not None
    assert isinstance(model.mmproj.source, HubSource)
    assert (model.mmproj.source.file, model.mmproj.source.revision) == ("mmproj-tiny-F16.gguf", COMMIT)
    assert model.use_cases == ("chat", "vision")
    path = files.locate_projector(model, here.data_dir)
    assert path is not None
    assert path.read_bytes() == projector
    path.unlink()
    with pytest.raises(ModelFileMissing, match=r"mmproj-tiny-F16\.gguf"):
        files.check(model, here.data_dir)


def test_the_same_file_gets_one_entry(remote: Hub, here: Settings, make_gguf: MakeGguf) -> None:
    remote.offer(**{"tiny-Q4_K_M.gguf": make_gguf(setup=chat_model).read_bytes()})
    first = register("hf.co/me/tiny:Q4_K_M", here)
    again = register(f"{remote.web.url}/me/tiny/resolve/main/tiny-Q4_K_M.gguf", here)
    assert (again.added, again.model) == (False, first.model)
    other = register("hf.co/me/tiny", here, name="mine:1", values={"context": 512, "slots": 2})
    assert not register("hf.co/me/tiny", here, name="mine:1").added, "a repeated command adds nothing"
    assert (other.added, other.model.context, other.model.slots) == (True, 512, 2)
    assert len(files.catalog_of(here).models) == len(files.read_catalog().models) + 2
    assert len(remote.cdn.requests) == 1, "the file is shared"


def test_a_split_file_is_one_model(remote: Hub, here: Settings, make_gguf: MakeGguf) -> None:
    def part(number: int) -> Callable[[gguf.GGUFWriter], None]:
        def setup(writer: gguf.GGUFWriter) -> None:
            chat_model(writer)
            writer.add_uint16("split.count", 2)
            writer.add_uint16("split.no", number)

        return setup

    names = [f"t-Q8_0-0000{number}-of-00002.gguf" for number in (1, 2)]
    contents = [make_gguf(name, setup=part(number)).read_bytes() for number, name in enumerate(names)]
    remote.offer(**dict(zip(names, contents, strict=True)))
    source, _ = hub.resolve(HubReference("me/tiny", file=names[0]), here.catalog.hub, here.catalog.hub_token)
    provisional = Model(name="a:1", use_cases=("chat",), source=source)
    free = install.MIN_FREE_BYTES + len(contents[0])
    with pytest.raises(DownloadFailed, match=r"t-Q8_0-00001-of-00002\.gguf with its other parts needs"):
        files.pull(provisional, here.data_dir, hub=here.catalog.hub, free_space=lambda _: free)
    added = register(f"hf.co/me/tiny/{names[1]}", here)
    assert [path.name for path in files.file_paths(added.model, here.data_dir)] == names
    assert len(added.model.source.sha256) == 2
    freed, _ = removal.remove_files(added.model, [], here.data_dir)
    assert freed == sum(map(len, contents))
    assert list((here.data_dir / files.FOLDER).iterdir()) == [], "no empty folders are left"


def test_a_broken_connection_is_resumed_and_a_busy_hub_is_asked_again(
    remote: Hub, here: Settings, make_gguf: MakeGguf
) -> None:
    content = make_gguf(setup=chat_model, rows=20_000).read_bytes()
    remote.offer(**{"tiny-Q4_K_M.gguf": content})
    remote.web.offers[remote.api].statuses = [503]
    remote.web.offers[remote.api].headers = {"Retry-After": "0"}
    remote.cdn.offers["/tiny-Q4_K_M.gguf"].cuts = [3_000_000, None]
    added = register("hf.co/me/tiny", here)
    assert added.path.read_bytes() == content
    assert remote.cdn.ranges[0] is None
    assert remote.cdn.ranges[1] is not None


def test_an_interrupted_registration_continues(remote: Hub, here: Settings, make_gguf: MakeGguf) -> None:
    content = make_gguf(setup=chat_model, rows=20_000).read_bytes()
    remote.offer(**{"tiny-Q4_K_M.gguf": content})
    stopped = KeyboardInterrupt()

    def stop(progress: Any) -> None:
        if progress.done > 1_000_000:
            raise stopped

    with pytest.raises(KeyboardInterrupt):
        service.register(HubReference("me/tiny"), "hf.co/me/tiny", here, stop)
    assert not files.own_catalog(here.data_dir).exists(), "no entry without a file"
    register("hf.co/me/tiny", here)
    assert [given is not None for given in remote.cdn.ranges] == [False, True]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "refuses this token (HTTP 401); accept the licence at"),
        (403, "refuses this token (HTTP 403); accept the licence at"),
        (404, "has no repository me/tiny (HTTP 404); check its spelling at"),
        (451, "answers HTTP 451"),
    ],
)
def test_a_refusal_of_the_hub_is_explained(remote: Hub, here: Settings, status: int, message: str) -> None:
    remote.web.offers[remote.api] = Offer(statuses=[status] * 9)
    assert message in refused("hf.co/me/tiny", here)


def test_without_a_token_the_setting_is_named(remote: Hub, here: Settings) -> None:
    remote.web.offers[remote.api] = Offer(statuses=[401], headers={"X-Error-Code": "GatedRepo"})
    without = here.model_copy(update={"catalog": here.catalog.model_copy(update={"hub_token": None})})
    assert "HTTP 401, GatedRepo" in (found := refused("hf.co/me/tiny", without))
    assert "Set catalog.hub_token" in found


@pytest.mark.parametrize(
    "body",
    [b"<html>", b"[" * 100_000, b"[]", b'{"siblings": 3}', b'{"siblings": [null, {"rfilename": "\\u001b.gguf"}]}'],
)
def test_what_the_hub_should_not_answer_is_refused(remote: Hub, here: Settings, body: bytes) -> None:
    remote.web.offers[remote.api] = Offer(body, etag=None)
    assert "sends no JSON" in (found := refused("hf.co/me/tiny", here)) or "has no GGUF file" in found


def test_a_list_of_files_is_bounded(remote: Hub, here: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_MAX_BYTES", 1000)
    remote.web.offers[remote.api] = Offer(b" " * 5000, etag=None, says_length=False)
    assert "more than 1,000 bytes" in refused("hf.co/me/tiny", here)


def test_a_file_that_leaves_its_folder_is_refused(remote: Hub, here: Settings) -> None:
    body = json.dumps({"siblings": [{"rfilename": "../../x.gguf", "size": 3}]}).encode()
    remote.web.offers[remote.api] = Offer(body, etag=None)
    assert "leaves the folder" in refused("hf.co/me/tiny", here)


def test_a_file_that_is_no_model_gets_no_entry(remote: Hub, here: Settings, make_gguf: MakeGguf) -> None:
    remote.offer(**{"x-Q4_K_M.gguf": make_gguf(setup=lambda writer: writer.add_type("adapter")).read_bytes()})
    assert "it is an adapter (LoRA)" in refused("hf.co/me/tiny", here)
    assert not list(here.data_dir.rglob("*.gguf")), "nothing could ever remove it"


def test_the_file_of_an_entry_that_is_replaced_is_removed(remote: Hub, here: Settings, make_gguf: MakeGguf) -> None:
    for name in ("one-7b.gguf", "two-7b.gguf"):
        remote.cdn.offers[f"/{name}"] = Offer(make_gguf(name).read_bytes())
    first = register(f"{remote.cdn.url}/one-7b.gguf", here, name="my:7b")
    second = register(f"{remote.cdn.url}/two-7b.gguf", here, name="my:7b", replace=True)
    assert not first.path.exists()
    assert second.path.exists()
    again = register(f"{remote.cdn.url}/two-7b.gguf", here, name="my:7b", replace=True, values={"slots": 1})
    assert again.path.exists(), "it is still the file of the entry"
    assert own_catalog.read(here.data_dir).get("my:7b").slots == 1


def test_a_path_and_a_url_are_added_too(remote: Hub, here: Settings, make_gguf: MakeGguf) -> None:
    path = make_gguf("bert.gguf", architecture="bert", setup=lambda writer: writer.add_context_length(512))
    local = register(str(path), here)
    assert isinstance(local.model.source, FileSource)
    assert (local.model.use_cases, local.model.context, local.path) == (("embed",), 512, path)
    remote.cdn.offers["/b-7b.gguf"] = Offer(make_gguf("b-7b.gguf").read_bytes())
    web = register(f"{remote.cdn.url}/b-7b.gguf", here)
    assert (web.model.name, web.model.use_cases) == ("b:7b", ("complete",))
    assert set(own_catalog.read(here.data_dir).names) == {local.model.name, "b:7b"}


def test_a_name_that_is_taken_is_refused_before_the_download(remote: Hub, here: Settings, make_gguf: MakeGguf) -> None:
    remote.offer(**{"tiny-Q4_K_M.gguf": make_gguf(setup=chat_model).read_bytes()})
    message = refused("hf.co/me/tiny", here, name="qwen3:4b")
    assert "qwen3:4b is already in the catalogue" in message
    assert "--name, or --replace" in message
    assert "too similar" in refused("hf.co/me/tiny", here, name="qwen3:0-6b")
    assert "No Name: is not accepted; accepted: family:size" in refused("hf.co/me/tiny", here, name="No Name")
    assert remote.cdn.requests == []

    assert "--context: 1" in refused("hf.co/me/tiny", here, values={"context": 1})
    assert remote.cdn.requests == [], "nor with values that are not accepted"
    added = register("hf.co/me/tiny", here, name="qwen3:4b", replace=True)
    assert files.catalog_of(here).get("qwen3:4b") == added.model, "it replaces the shipped one"
    with own_catalog.locked(here.data_dir):
        assert own_catalog.remove("qwen3:4b", here.data_dir)
    assert files.catalog_of(here).get("qwen3:4b").source.label == "hf Qwen/Qwen3-4B-GGUF"


# The file of the data directory


def entry(name: str, **values: Any) -> Model:
    return Model.model_validate({"name": name, "use_cases": ["chat"], "source": {"path": "/x.gguf"}, **values})


def put(model: Model, folder: Path, *, replace: bool = False) -> None:
    with own_catalog.locked(folder):
        own_catalog.put(model, folder, (), "a comment", replace=replace)


def test_what_people_wrote_stays(tmp_path: Path) -> None:
    put(entry("a:1"), tmp_path)
    put(entry("b:1"), tmp_path)
    path = files.own_catalog(tmp_path)
    text = path.read_text().replace(
        'name = "a:1"', 'name = "a:1"   # mine\ndescription = """\n[[models]] in a text\n"""'
    )
    path.write_text(text + "\n[models.pools]\nkeep_alive = '1h'\n\n# the end\n")
    put(entry("c:1"), tmp_path)
    put(entry("b:1", context=128), tmp_path, replace=True)

    text = path.read_text()
    assert '"a:1"   # mine' in text
    assert [model.context for model in own_catalog.read(tmp_path)] == [4096, 4096, 128]
    with own_catalog.locked(tmp_path):
        assert own_catalog.remove("c:1", tmp_path)
        assert not own_catalog.remove("c:1", tmp_path)
    assert own_catalog.read(tmp_path).names == ("a:1", "b:1")
    assert '"a:1"   # mine' in path.read_text()
    assert not list(tmp_path.glob("*.part"))


def test_a_file_in_another_form_is_left_alone(tmp_path: Path) -> None:
    path = files.own_catalog(tmp_path)
    text = "models = [ { name = 'a:1', use_cases = ['chat'], source = { path = '/x.gguf' } } ]\n"
    path.write_text(text)
    with own_catalog.locked(tmp_path), pytest.raises(Conflict, match="edit it by hand"):
        own_catalog.remove("a:1", tmp_path)
    path.write_text("[[models]\n")
    with own_catalog.locked(tmp_path), pytest.raises(InvalidCatalog):
        own_catalog.put(entry("b:1"), tmp_path, (), "x", replace=False)
    assert path.read_text() == "[[models]\n"


def test_pulls_at_the_same_time_lose_no_entry(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: put(entry(f"m:{number}"), tmp_path), range(24)))
    assert len(own_catalog.read(tmp_path).models) == 24


def test_a_name_is_added_once(tmp_path: Path) -> None:
    put(entry("a.b:1"), tmp_path)
    for name in ("a.b:1", "a-b:1"):  # with the same slug
        with pytest.raises(Conflict, match="already in the catalogue"):
            put(entry(name), tmp_path)


def test_a_running_process_reads_the_catalogue_again_and_survives_an_invalid_one(tmp_path: Path) -> None:
    here = settings_module.load(environment={"ARRIERO_DATA_DIR": str(tmp_path)}).settings
    live = LiveCatalog(here)
    before = live.current()
    assert live.current() is before
    put(entry("a:1"), tmp_path)
    assert live.current().find("a:1") is not None
    valid = files.own_catalog(tmp_path).read_text()
    files.own_catalog(tmp_path).write_text("[[models]\n")
    assert live.current().find("a:1") is not None, "the last valid one stays in force"
    files.own_catalog(tmp_path).write_text(valid.replace("a:1", "b:1"))
    assert live.current().find("b:1") is not None
    files.own_catalog(tmp_path).unlink()
    assert live.current().names == before.names


def test_many_threads_may_ask_for_the_catalogue(tmp_path: Path) -> None:
    here = settings_module.load(environment={"ARRIERO_DATA_DIR": str(tmp_path)}).settings
    live, done = LiveCatalog(here), threading.Event()

    def ask() -> int:
        asked = 0
        while not done.is_set():
            assert live.current().models
            asked += 1
        return asked

    with ThreadPoolExecutor(4) as threads:
        askers = [threads.submit(ask) for _ in range(4)]
        for number in range(10):
            put(entry(f"m:{number}"), tmp_path)
        done.set()
        assert all(asker.result() for asker in askers)
    assert live.current().find("m:9") is not None


# Redirects


@pytest.mark.parametrize(
    ("peers", "refused_with"),
    [
        (["93.184.216.34", "93.184.216.35"], None),
        (["127.0.0.1", "10.0.0.1"], None),
        (["93.184.216.34", "169.254.169.254"], "metadata service"),
        (["93.184.216.34", "93.184.216.35", "127.0.0.1"], "this machine itself"),
    ],
)
def test_a_public_server_cannot_redirect_to_a_private_one(peers: list[str], refused_with: str | None) -> None:
    """The addresses are those of the sockets, which no test can have; the answers are stand-ins with them."""
    with download.http_client() as client:
        (check,) = client.event_hooks["response"]

        def follow() -> None:
            for index, peer in enumerate(peers):
                stream = SimpleNamespace(get_extra_info=lambda _, peer=peer: (peer, 443))
                last = index == len(peers) - 1
                url = SimpleNamespace(host="there.example")
                check(SimpleNamespace(extensions={"network_stream": stream}, url=url, has_redirect_location=not last))  # type: ignore[arg-type] # it has what `check` reads of a response

        if refused_with is None:
            follow()
            follow()
        else:
            with pytest.raises(DownloadFailed, match=refused_with):
                follow()


def test_the_token_is_no_part_of_the_settings_that_are_shown(here: Settings) -> None:
    assert isinstance(here.catalog.hub_token, SecretStr)
    assert TOKEN not in repr(here)

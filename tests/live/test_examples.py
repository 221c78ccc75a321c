"""
The examples of the documentation, as a reader would run them: every command of the pages below, in its order.

A new block runs by itself. What cannot run here is named in NOT_RUN with the reason; a block of an unknown kind fails.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.live import forked_command
from tests.live.conftest import MODEL, PATIENCE, ROOT, Live, until

pytestmark = pytest.mark.slow

PAGES = ("README.md", "docs/openai.md", "docs/ollama.md", "docs/client.md")
#: Pages of which the commands and programs are run, in a folder with FILES.
WITH_FILES = (
    *("docs/alerts.md", "docs/batches.md", "docs/blocks.md", "docs/consolidation.md", "docs/conversations.md"),
    *("docs/memories.md", "docs/memory.md", "docs/personal-context.md", "docs/prompt-assembly.md", "docs/recall.md"),
    *("docs/handoffs.md", "docs/mcp.md"),
)
FILES = {
    "requests.jsonl": '{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": '
    '"smollm2:135m", "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 4}}\n',
    "notes.txt": "The lease of the boat ends on 31 May. We had soup, and then a walk along the river.\n",
    "tone.md": "# Tone\nShort answers.\n",
    "notes/projects/boat.md": "# Boat\nAna and Ben are in the crew.\n",
}
#: By the beginning of a command, why it is not run here.
NOT_RUN = {
    "make demo": "it sets up from nothing; tests/workers/test_demo_quality.py and tests/deploy do its parts",
    "make test": "it is what runs this",
    "arriero up": "the fixture does: it stays in the foreground",
    "arriero models pull qwen3:0.6b": "it needs the network",
    "arriero models pull hf.co/": "it needs the network",
    "arriero batches cancel": "the batch has ended",
    "arriero actions show": "it needs an action; tests/cli/test_governance.py has them",
    "arriero actions undo": "as before",
    "arriero alerts ack": "it needs an alert; tests/cli/test_governance.py has them",
    "arriero alerts show": "as before",
    "arriero alerts set-channel ops": "it needs hooks.example.com in http.allowed_hosts",
    "arriero alerts test": "it needs that channel",
    "arriero consolidations show": "it needs a consolidation that has ended",
    "arriero consolidate --wait": "it waits for a model; tests/memory/consolidation do it",
    "pip install": "it needs the network",
    "arriero memories extraction on --model qwen3:4b": "the model is not installed here",
    "arriero memories extraction on --conversation": "it needs the id of a conversation",
    "curl -sN http://127.0.0.1:8470/v1/runs/ID/": "it needs the id of a run; tests/client reads the tokens of one",
}
#: Kinds of blocks that are run of these pages.
RUN = ("sh", "python")
#: Kinds of blocks that are no commands.
PICTURES = ("mermaid", "")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[str]:
        """The commands of a block of the shell, those that are not run left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not any(line.startswith(one) for one in NOT_RUN)]


def blocks() -> Iterator[Block]:
    for page in (*PAGES, *WITH_FILES):
        text = (ROOT / page).read_text()
        for match in _BLOCK.finditer(text):
            yield Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])


@pytest.fixture(scope="session")
def reader(live: Live, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """
    The environment of a reader, whose commands are for the running tree. The model of support-triage is there.

    `arriero` is a fork of a process that has loaded the commands: without it, their starts take half of the time.
    """
    live.arriero("models", "pull", "gemma3:270m")
    home = tmp_path_factory.mktemp("reader")
    (home / "models").mkdir()
    (home / "bin").mkdir()
    folder = Path(tempfile.mkdtemp())  # the address of a socket is short
    forked_command.write_client(home / "bin" / "arriero", folder / "s")
    path = os.pathsep.join([str(home / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    server = [sys.executable, "-m", "tests.live.forked_command", str(folder / "s")]
    with subprocess.Popen([*server, f"--data-dir={live.folder}", f"--set=api.url={live.api}"], cwd=ROOT) as process:
        until((folder / "s").exists)
        yield {**os.environ, "PATH": path, "HOME": str(home), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'client'}"}
        process.terminate()
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the commands of pages with files are run."""
    folder = tmp_path_factory.mktemp("desk")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.mark.parametrize("block", [one for one in blocks() if one.page in PAGES or one.kind in RUN], ids=str)
def test_an_example_works_as_printed(
    block: Block, live: Live, reader: dict[str, str], desk: Path, tmp_path: Path
) -> None:
    text = block.text.replace("http://127.0.0.1:8470", live.api)
    match block.kind:
        case "sh":
            lines = "\n".join(block.commands()).replace("http://127.0.0.1:8470", live.api)
            # curl ends with 0 whatever the server says, unless it is asked not to.
            command = ["bash", "-euo", "pipefail", "-c", lines.replace("curl -s", "curl --fail-with-body -s")]
        case "python":
            command = [sys.executable, "-W", "error", "-c", text]
        case "yaml":
            (tmp_path / "example.yaml").write_text(text)
            command = ["arriero", "workflows", "check", str(tmp_path / "example.yaml")]
        case kind if kind in PICTURES:
            return
        case _:
            pytest.fail(f"{block} is of the unknown kind {block.kind!r}: say here how it is tested")
    done = subprocess.run(
        command,
        input="Say hello.",  # what `arriero chat` answers
        capture_output=True,
        text=True,
        cwd=ROOT if block.page in PAGES else desk,
        env=reader,
        timeout=PATIENCE * 2,
        check=False,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"


def test_what_is_not_run_is_still_in_the_pages() -> None:
    pages = "".join((ROOT / page).read_text() for page in (*PAGES, *WITH_FILES))
    assert [one for one in NOT_RUN if f"\n{one}" not in pages] == []
    assert MODEL in pages

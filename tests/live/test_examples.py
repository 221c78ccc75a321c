"""
The examples of the documentation, as a reader would run them: every command of the pages below, in its order.

A new block runs by itself. What cannot run here is named in NOT_RUN with the reason; a block of an unknown kind fails.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.live.conftest import MODEL, PATIENCE, ROOT, Live

pytestmark = pytest.mark.slow

PAGES = ("README.md", "docs/openai.md", "docs/ollama.md", "docs/client.md")
#: By the beginning of a command, why it is not run here.
NOT_RUN = {
    "make demo": "it sets up from nothing; tests/workers/test_demo_quality.py and tests/deploy do its parts",
    "make test": "it is what runs this",
    "arriero up": "the fixture does: it stays in the foreground",
    "arriero models pull qwen3:0.6b": "it needs the network",
    "arriero models pull hf.co/": "it needs the network",
    "curl -sN http://127.0.0.1:8470/v1/runs/ID/": "it needs the id of a run; tests/client reads the tokens of one",
}
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
    for page in PAGES:
        text = (ROOT / page).read_text()
        for match in _BLOCK.finditer(text):
            yield Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])


@pytest.fixture(scope="session")
def reader(live: Live, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a reader, whose commands are for the running tree. The model of support-triage is there."""
    live.arriero("models", "pull", "gemma3:270m")
    home = tmp_path_factory.mktemp("reader")
    (home / "models").mkdir()
    (home / "bin").mkdir()
    command = home / "bin" / "arriero"
    arguments = [sys.executable, "-m", "app", f"--data-dir={live.folder}", f"--set=api.url={live.api}"]
    command.write_text(f'#!/bin/sh\nexec {shlex.join(arguments)} "$@"\n')
    command.chmod(0o755)
    path = os.pathsep.join([str(home / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "HOME": str(home), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'client'}"}


@pytest.mark.parametrize("block", list(blocks()), ids=str)
def test_an_example_works_as_printed(block: Block, live: Live, reader: dict[str, str], tmp_path: Path) -> None:
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
        cwd=ROOT,
        env=reader,
        timeout=PATIENCE * 2,
        check=False,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"


def test_what_is_not_run_is_still_in_the_pages() -> None:
    pages = "".join((ROOT / page).read_text() for page in PAGES)
    assert [one for one in NOT_RUN if f"\n{one}" not in pages] == []
    assert MODEL in pages

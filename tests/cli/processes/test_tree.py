"""The process tree of `arriero up`: its start with files that cannot be served, and its stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.cli.processes.tree import Signals, Tree, running_tree
from app.kernel import settings as settings_module
from app.kernel.errors import ModelFileDamaged, ModelFileMissing, ModelFileUnusable
from app.kernel.settings import Settings

ENTRY = '[[models]]\nname = "a:1"\nuse_cases = ["chat"]\nsource = {{ path = "{path}" }}\n'


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (None, ModelFileMissing, r"a:1: there is no file .*a\.gguf; put it there, or correct `path`"),
        (b"GGUF\x03", ModelFileDamaged, r"a\.gguf is not a usable GGUF file: .*; replace the file, or correct `path`"),
    ],
)
def test_nothing_starts_when_a_kept_model_cannot_be_served(
    tmp_path: Path, content: bytes | None, kind: type[ModelFileUnusable], message: str
) -> None:
    (tmp_path / "catalog.toml").write_text(ENTRY.format(path=tmp_path / "a.gguf"))
    if content is not None:
        (tmp_path / "a.gguf").write_bytes(content)
    given = {"ARRIERO_CATALOG__FILES": str(tmp_path / "catalog.toml"), "ARRIERO_POOLS__MODELS": "a:1"}
    loaded = settings_module.load(environment=given | {"ARRIERO_DATA_DIR": str(tmp_path / "data")}).settings
    with pytest.raises(kind, match=message), running_tree(loaded, Signals(), lambda *_: None, flower=False):
        pass
    assert not (tmp_path / "data").exists()


def test_a_stop_removes_the_addresses_of_metrics(tmp_path: Path) -> None:
    """A fast stop kills the pools, and the agent that would have removed their files."""
    stale = tmp_path / "metrics" / "pool.m-1.abcdef.json"
    stale.parent.mkdir()
    stale.write_text("[]")
    Tree(Settings(), tmp_path, lambda *_: None, []).stop(Signals())
    assert not stale.exists()

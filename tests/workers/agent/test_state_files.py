"""Stored states end with their model."""

from __future__ import annotations

from pathlib import Path

from workers.agent import state_files

FILE = f"{'a' * 32}-{'b' * 32}.kv"


def test_states_of_models_that_are_gone_are_removed(tmp_path: Path) -> None:
    for name in ("here-1b", "gone-2b", "gone-with-notes", "Not a model"):
        (tmp_path / "kv" / name).mkdir(parents=True)
        (tmp_path / "kv" / name / FILE).write_bytes(b"x")
    (tmp_path / "kv" / "gone-with-notes" / "notes.txt").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / FILE).write_bytes(b"x")
    (tmp_path / "kv" / "linked").symlink_to(tmp_path / "elsewhere")
    state_files.remove_unknown(tmp_path, ["here-1b"])
    left = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file())
    assert left == sorted(
        [f"elsewhere/{FILE}", f"kv/Not a model/{FILE}", f"kv/here-1b/{FILE}", "kv/gone-with-notes/notes.txt"]
    )
    assert not (tmp_path / "kv" / "gone-2b").exists()
    state_files.remove_unknown(tmp_path / "nowhere", [])

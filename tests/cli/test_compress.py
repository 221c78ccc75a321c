"""`arriero compress`: what it reads, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.cli import compress
from app.kernel.errors import InvalidInput
from tests.cli.conftest import Arriero


def test_a_file_with_messages_is_a_conversation_and_any_other_a_text(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "a"}]
    file = tmp_path / "said.json"
    for content, expected in (
        (json.dumps(said), said),
        (json.dumps({"messages": said}), said),
        ('{"a": 1}', '{"a": 1}'),
    ):
        file.write_text(content)
        assert compress._read(file) == expected
    file.write_text("{")
    with pytest.raises(InvalidInput, match=r"said\.json"):
        compress._read(file)
    with pytest.raises(InvalidInput, match="FILE"):
        compress._read(tmp_path / "none.txt")


def test_a_model_that_does_not_exist_is_refused(arriero: Arriero, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("a text")

    with pytest.raises(InvalidInput, match="the catalogue has no model 'nope'"):
        arriero("compress", file, "--model", "nope", "--ratio", "2")

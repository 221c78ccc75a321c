"""Conversations at the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.kernel.errors import InvalidInput, NotFound
from tests.cli.conftest import Arriero


def test_the_life_of_a_conversation(arriero: Arriero, tmp_path: Path) -> None:
    made = arriero("conversations", "create", "I drink green tea", "--user", "ada", "--title", "Tea\x1b[31m",
                   "--metadata", "topic:tea").stdout.strip()  # fmt: skip
    assert made.startswith("conv_")
    arriero("conversations", "append", made, "So do I", "--role", "assistant", "--name", "Bo")
    listed = arriero("conversations", "list", "--user", "ada", "--metadata", "topic:tea").stdout
    assert made in listed
    assert "\x1b" not in listed
    shown = arriero("conversations", "show", made).stdout
    assert "2 messages" in shown
    assert "#2 Bo (assistant)\nSo do I" in shown
    assert "green tea" in arriero("conversations", "search", "tea", "--conversation", made).stdout
    assert arriero("conversations", "export", made, "--format", "markdown").stdout.startswith("# Tea")

    file = tmp_path / "it.jsonl"
    arriero("conversations", "export", made, "-o", file)
    other = arriero("conversations", "create").stdout.strip()
    assert arriero("conversations", "append", other, "--file", file).stdout == "2 appended\n"
    forked = json.loads(arriero("conversations", "fork", other, "--at", "1", "--json").stdout)
    assert (forked["messages"], forked["forked_from"]) == (1, other)

    deleted = arriero("conversations", "delete", made, "--yes").stdout
    assert f"{made} is deleted: " in deleted
    assert "proof: a search in " in deleted
    with pytest.raises(NotFound):
        arriero("conversations", "show", made)
    assert arriero("conversations", "show", other).exit_code == 0
    arriero("conversations", "delete", other, forked["id"], "--yes")
    assert "no conversations" in arriero("conversations", "list").stderr


def test_what_is_wrong_is_said(arriero: Arriero, tmp_path: Path) -> None:
    made = arriero("conversations", "create").stdout.strip()
    broken = tmp_path / "b.jsonl"
    broken.write_text('{"role": "user", "content": "a"}\nno\n')
    for message, arguments in (
        ("one of TEXT and --file", ("append", made)),
        ("line 2", ("append", made, "--file", broken)),
        ("one of ID and --user", ("delete",)),
        ("KEY:VALUE", ("create", "--metadata", "x")),
        ("tool_call_id", ("append", made, "x", "--role", "tool")),
    ):
        with pytest.raises(InvalidInput, match=message):
            arriero("conversations", *arguments)


def test_the_retention_of_a_namespace(arriero: Arriero) -> None:
    assert (
        arriero("conversations", "retention").stdout
        == "default: conversations are kept until they are deleted (settings)\n"
    )
    assert "for 90d (namespace)" in arriero("conversations", "retention", "--set", "90d").stdout
    assert "until they are deleted (namespace)" in arriero("conversations", "retention", "--set", "forever").stdout
    assert "(settings)" in arriero("conversations", "retention", "--unset").stdout

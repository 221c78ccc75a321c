"""`arriero blocks` and `arriero context`, on the real database."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.kernel.errors import Conflict, InvalidInput, NotFound
from tests.cli.conftest import Arriero


def test_a_block_from_its_creation_to_its_end(arriero: Arriero, tmp_path: Path) -> None:
    file = tmp_path / "human.txt"
    file.write_text("Ana\nVigo\n")
    id_ = arriero(
        "blocks", "create", "human", "--value", "Ana", "--description", "the user", "-u", "ana"
    ).stdout.strip()

    assert arriero("blocks", "edit", "human", "--file", file).stdout == "human is at version 2\n"
    assert arriero("blocks", "show", "human").stdout.endswith("Ana\nVigo\n")
    assert "+Vigo" in arriero("blocks", "diff", "human").stdout
    with pytest.raises(Conflict, match="is at version 2, and the change is based on version 1"):
        arriero("blocks", "edit", "human", "--value", "x", "--version", "1")
    arriero("blocks", "rollback", "human", "1")
    history = arriero("blocks", "history", "human").stdout
    assert "rollback to 1" in history
    assert "local" in history
    assert '<block label="human" characters="3/2000">' in arriero("blocks", "prompt", "--user", "ana").stdout
    assert "agent helper, user ana" in arriero("blocks", "attach", id_, "--agent", "helper").stdout
    assert "attached to agent helper" in arriero("blocks", "detach", id_, "--user", "ana").stdout
    arriero("blocks", "archive", "human")
    assert id_ in arriero("blocks", "list", "--archived", "-q", "AN").stdout
    arriero("blocks", "restore", "human")
    arriero("blocks", "apply", "assistant", "--agent", "other")
    assert "assistant" in arriero("blocks", "templates").stdout
    with pytest.raises(InvalidInput, match="2 blocks have the label 'human'; accepted: an id: block_"):
        arriero("blocks", "show", "human")
    arriero("blocks", "delete", id_)
    with pytest.raises(NotFound):
        arriero("blocks", "show", id_)
    with pytest.raises(InvalidInput, match="--user, --conversation, --agent or --everybody"):
        arriero("blocks", "attach", "human")


def test_templates_are_stored_from_files_shown_applied_and_removed(arriero: Arriero, tmp_path: Path) -> None:
    file = tmp_path / "support.yaml"
    file.write_text(
        """
templates:
  - name: support
    blocks:
      - {label: customer, description: Who asks.}
      - label: tone
        value: |-
          Friendly, ünd short.
          No promises.
        read_only: true
  - name: sales
    blocks: [{label: lead, value: none}]
"""
    )
    assert arriero("blocks", "templates", "apply", file).stdout == (
        "support is stored: customer, tone\nsales is stored: lead\n"
    )
    listed = json.loads(arriero("blocks", "templates", "--json").stdout)["templates"]
    assert [one["name"] for one in listed] == ["assistant", "project", "sales", "support"]
    shown = arriero("blocks", "templates", "show", "support").stdout
    again = tmp_path / "again.yaml"
    again.write_text(shown)
    assert arriero("blocks", "templates", "apply", again).stdout == "support is stored: customer, tone\n"
    assert arriero("blocks", "templates", "show", "support").stdout == shown
    arriero("blocks", "apply", "support", "--user", "ana")
    assert arriero("blocks", "show", "tone").stdout.endswith("Friendly, ünd short.\nNo promises.\n")

    again.write_text("name: support\nblocks:\n  - {label: Not a label}\n")
    with pytest.raises(InvalidInput, match="label"):
        arriero("blocks", "templates", "apply", again)
    again.write_text("templates:\n  - {name: new, blocks: [{label: a}]}\n  - {name: other, block: []}\n")
    with pytest.raises(InvalidInput, match=r"templates\[1\] \(line 3\): it is no template; accepted: `name`"):
        arriero("blocks", "templates", "apply", again)
    with pytest.raises(NotFound):
        arriero("blocks", "templates", "show", "new")
    assert arriero("blocks", "templates", "delete", "support").stdout == "support is removed\n"
    assert "support" not in arriero("blocks", "templates").stdout


def test_documents_are_put_listed_shown_imported_and_removed(arriero: Arriero, tmp_path: Path) -> None:
    folder = tmp_path / "ana"
    for name, text in {
        "projects/boat.md": "# Boat\nThe boat is called Marea.",
        "preferences/tone.json": '{"tone": "short"}',
        "plans/x.md": "text",
        "projects/bad.md": "---\ntitel: x\n---\ntext",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    result = arriero("context", "import", folder, "--user", "ana", exits=2)
    assert "2 document(s) stored, 2 file(s) refused" in result.stdout
    assert "projects/bad.md: content.titel: there is no such field" in result.stderr
    assert "projects/boat" in arriero("context", "list", "-u", "ana").stdout
    assert arriero("context", "show", "projects/boat", "-u", "ana").stdout == "# Boat\nThe boat is called Marea.\n"
    found = json.loads(arriero("context", "relevant", "which boat?", "-u", "ana", "--json").stdout)
    assert [part["name"] for part in found["parts"]] == ["tone", "boat"]
    put = arriero("context", "put", "projects/boat", folder / "projects/boat.md", "--user", "ana")
    assert put.stdout == "projects/boat is at version 1\n"
    with pytest.raises(Conflict, match="is based on version 0"):
        arriero("context", "put", "projects/boat", folder / "projects/boat.md", "-u", "ana", "--version", "0")
    arriero("context", "rm", "projects/boat", "-u", "ana")
    with pytest.raises(NotFound):
        arriero("context", "show", "projects/boat", "-u", "ana")
    with pytest.raises(InvalidInput, match="with one of the kinds preferences, projects"):
        arriero("context", "show", "plans/x")
    assert json.loads(arriero("context", "list", "--problems", "--json").stdout) == {"files": []}

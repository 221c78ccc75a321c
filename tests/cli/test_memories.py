"""`arriero remember`, `memories` and `forget`."""

from __future__ import annotations

import json

import pytest

from app.kernel.errors import InvalidInput
from tests.cli.conftest import Arriero


def test_memories_from_the_first_to_the_last_command(arriero: Arriero) -> None:
    tea = arriero("remember", "Ana prefers tea", "--kind", "preference", "--user", "ana").stdout.strip()
    assert tea.startswith("mem_")
    again = arriero("remember", "ana prefers tea.", "-u", "ana")
    assert again.stdout.strip() == tea
    assert "known already" in again.stderr
    coffee = arriero("remember", "Ana prefers coffee", "-u", "ana", "--supersedes", tea).stdout.strip()

    listed = arriero("memories", "list", "--user", "ana").stdout
    assert coffee in listed
    assert tea not in listed
    assert "superseded" in arriero("memories", "history", tea).stdout
    assert "breakthrough" in arriero("memories", "breakthrough", coffee).stdout
    assert coffee in arriero("memories", "list", "--kind", "breakthrough").stdout
    assert "hand" in arriero("memories", "show", coffee).stdout
    assert "holds no more" in arriero("memories", "invalidate", coffee).stdout
    assert "no memories" in arriero("memories", "list").stdout
    assert "nothing was refused" in arriero("memories", "refused").stdout
    chosen = json.loads(arriero("memories", "extraction", "on", "--model", "smollm2:135m", "--json").stdout)
    assert (chosen["effective"], chosen["effective_model"]) == (True, "smollm2:135m")

    arriero("forget", "--query", "prefers", exits=1)  # nobody has agreed
    assert len(json.loads(arriero("memories", "list", "--all", "--json").stdout)["memories"]) == 2
    forgotten = arriero("forget", "--query", "prefers", "--yes").stdout
    assert "2 forgotten" in forgotten
    assert "passages and vectors" in forgotten
    assert json.loads(arriero("memories", "list", "--all", "--json").stdout)["memories"] == []
    with pytest.raises(InvalidInput, match="what to forget"):
        arriero("forget")

"""`arriero recall`: what it finds and shows."""

from __future__ import annotations

import json

import pytest

from app.kernel.database import Database
from app.kernel.errors import InvalidInput
from app.memory.recall import storage
from app.memory.recall.passages import NewPassage, SourceKind
from tests.cli.conftest import Arriero


def test_what_was_said_is_shown_with_the_reason(arriero: Arriero, database: Database) -> None:
    texts = ["The boat is [red]green[/red].", "We had soup."]
    passages = [
        NewPassage("default", SourceKind.MESSAGE, f"msg_{n}", one, "anna", "conv_1", n) for n, one in enumerate(texts)
    ]
    with database.work() as work:
        storage.put_in(work, passages)

    shown = arriero("recall", "which boat", "--user", "anna", "--source", "message").output
    assert "[red]green" in "".join(shown.split()).replace("│", "")
    assert "has the words boat" in " ".join(shown.split())
    assert "not searched: no embedding model is configured" in " ".join(shown.split())
    assert arriero("recall", "boat", "--user", "ben").output.startswith("nothing was found")
    found = json.loads(arriero("recall", "soup", "--user", "anna", "-n", "1", "--json").stdout)
    assert [one["source_id"] for one in found["passages"]] == ["msg_1"]

    assert "2 passages; 2 without vectors yet" in arriero("recall", "--status").output
    assert json.loads(arriero("recall", "--status", "--json").stdout)["waiting"]["count"] == 2
    with pytest.raises(InvalidInput, match="either a query or --status"):
        arriero("recall")

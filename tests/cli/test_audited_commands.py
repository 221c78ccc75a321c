"""Commands that change something without the API write their entry of the audit log themselves."""

from __future__ import annotations

import getpass
import json

from app.kernel.database import Database
from tests.cli.conftest import Arriero


def test_a_key_that_is_written_directly_has_an_entry(arriero: Arriero, database: Database) -> None:
    made = json.loads(
        arriero(
            "--set",
            f"database_url={database.url}",
            "keys",
            "create",
            "first",
            "--scope",
            "admin",
            "--direct",
            "--json",
        ).stdout
    )
    (entry,) = json.loads(arriero("audit", "--json").stdout)["entries"]

    assert entry["actor"] == f"command line ({getpass.getuser()})"
    assert (entry["action"], entry["target"], entry["status"]) == (
        "arriero keys create --direct",
        {"id": made["id"]},
        0,
    )
    assert made["key"] not in str(entry)

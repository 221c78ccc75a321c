"""`arriero handoffs`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.kernel.errors import NotFound
from tests.cli.conftest import Arriero

BOX = """
handoff: box
source: {kind: email, imap: {host: imap.example.com, user: ana, password: mailbox}}
mapping: {cel: "{'subject': message.subject}"}
target: {kind: http, url: "https://crm.example.com/mails"}
"""


def test_a_mailbox_is_shown_with_what_it_waits_for(arriero: Arriero, tmp_path: Path) -> None:
    file = tmp_path / "box.yaml"
    file.write_text(BOX)
    arriero("handoffs", "put", str(file))
    shown = " ".join(arriero("handoffs", "mailbox", "box").stdout.split())
    assert "imap.example.com" in shown
    assert "mail.imap_hosts" in shown
    found = json.loads(arriero("handoffs", "mailbox", "box", "--json").stdout)
    assert (found["is_connected"], found["next_uid"]) == (False, 1)
    with pytest.raises(NotFound, match="nothing"):
        arriero("handoffs", "mailbox", "nothing")

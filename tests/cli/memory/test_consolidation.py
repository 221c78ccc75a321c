"""`arriero consolidate` and `arriero consolidations`."""

from __future__ import annotations

import json

import pytest

from app.kernel.errors import InvalidInput, NotFound
from tests.cli.conftest import Arriero


def test_a_consolidation_is_begun_once_shown_and_cancelled(arriero: Arriero) -> None:
    assert "there is no consolidation" in arriero("consolidations", "list").output
    made = json.loads(arriero("consolidate", "--json").stdout)
    assert (made["state"], made["namespace"], made["created"]) == ("queued", "default", True)
    again = arriero("consolidate")
    assert made["id"] in again.output
    assert "one is in progress already" in " ".join(again.output.split())

    assert made["id"] in arriero("consolidations", "list").output
    assert json.loads(arriero("consolidations", "show", made["id"], "--json").stdout)["progress"]["requests"] == 0
    shown = arriero("consolidations", "show", made["id"]).output
    assert "0 turns" in shown
    assert "0 written, 0 merged, 0 refused" in shown
    assert "cancelled" in arriero("consolidations", "cancel", made["id"]).output
    assert json.loads(arriero("consolidations", "list", "--json").stdout)["consolidations"][0]["state"] == "cancelled"


def test_a_namespace_has_a_schedule(arriero: Arriero) -> None:
    assert "default: only by hand" in arriero("consolidations", "schedule").output
    chosen = " ".join(arriero("consolidations", "schedule", "--every", "1d", "--model", "smollm2:135m").output.split())
    assert "default: every 1d, next at" in chosen
    assert "by smollm2:135m, reviewed by smollm2:135m" in chosen
    kept = json.loads(arriero("consolidations", "schedule", "--every", "2d", "--json").stdout)
    assert (kept["every"], kept["model"]) == ("2d", "smollm2:135m"), "what is not named stays"
    assert "only by hand" in arriero("consolidations", "schedule", "--every", "never").output


def test_what_is_wrong_is_said(arriero: Arriero) -> None:
    with pytest.raises(NotFound):
        arriero("consolidations", "show", "cons_01a206d9b6797e1786137b2169115a8e")
    with pytest.raises(InvalidInput, match="every"):
        arriero("consolidations", "schedule", "--every", "5s")
    with pytest.raises(NotFound, match="nowhere"):
        arriero("consolidate", "--model", "nowhere:1b")

"""`arriero config`, `limits` and `audit`, on the real database and broker."""

from __future__ import annotations

import json

from tests.cli.conftest import Arriero


def test_a_setting_is_changed_shown_and_reverted(arriero: Arriero) -> None:
    arriero("config", "set", "runs.retention", "7d", "--reason", "fewer disks")
    arriero("config", "set", "http.allowed_hosts", "a.example, b.example", "-m", "a partner")
    (row,) = json.loads(arriero("config", "show", "runs.retention", "--json").stdout)
    assert (row["value"], row["origin"]) == ("7d", "run time, version 2")
    assert "a.example, b.example" in arriero("config", "show", "http").stdout

    lines = arriero("config", "history").stdout.splitlines()
    assert ["fewer disks" in line for line in lines] == [False, False, True]
    assert "runs.retention: - → 7d" in lines[2]
    arriero("config", "unset", "http.allowed_hosts", "-m", "no partner")
    arriero("config", "revert", "0", "-m", "as it was")
    (row,) = json.loads(arriero("config", "show", "runs.retention", "--json").stdout)
    assert (row["value"], row["origin"]) == ("30d", "default")
    assert "log.level" in arriero("config", "changeable").stdout


def test_limits_are_set_shown_and_cleared(arriero: Arriero) -> None:
    assert "600" in arriero("limits", "set", "namespace", "research", "--requests", "600", "--waiting", "0").stdout
    found = json.loads(arriero("limits", "show", "--json").stdout)
    assert [(one["id"], one["requests_per_minute"], one["set"]) for one in found["limits"]] == [
        ("research", 600, ["requests_per_minute", "waiting_interactive"])
    ]
    assert "research" in arriero("limits", "show").stdout
    assert "-" in arriero("limits", "show", "namespace", "default").stdout
    arriero("limits", "clear", "namespace", "research")
    assert json.loads(arriero("limits", "show", "--json").stdout)["limits"] == []


def test_the_audit_log_tells_of_both(arriero: Arriero) -> None:
    arriero("limits", "set", "namespace", "n-1", "--tokens", "5")
    arriero("config", "set", "audit.retention", "90d", "-m", "a rule of ours")
    found = json.loads(arriero("audit", "--json", "--since", "1h").stdout)["entries"]
    assert [one["action"] for one in found] == ["PATCH /v1/admin/settings", "PUT /v1/limits/{kind}/{id}"]
    table = arriero("audit", "--target", "n-1").stdout
    assert "tokens_per_minute" in table
    assert "a rule of ours" not in table
    assert arriero("audit", "--since", "2999-01-01T00:00:00").stdout == "no entries\n"

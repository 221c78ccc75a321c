"""Devices over HTTP, and in the command."""

from __future__ import annotations

import json

from fastapi.testclient import TestClient
from typer.testing import CliRunner

from app.cli import app


def test_devices_of_this_host(client: TestClient) -> None:
    answer = client.get("/v1/devices").json()
    ram = answer["devices"][0]
    assert (ram["name"], ram["kind"], ram["simulated"]) == ("cpu", "cpu", False)
    assert ram["used"] == ram["total"] - ram["free"] > 0
    assert answer["problems"] == []


def test_the_command_prints_the_same_devices() -> None:
    given = ["--set", 'fleet.simulated=[{"name": "sim-0", "bytes": "24GiB"}]', "devices"]
    devices = json.loads(CliRunner().invoke(app, [*given, "--json"]).stdout)["devices"]
    assert {device["name"]: device["simulated"] for device in devices}.items() >= {"cpu": False, "sim-0": True}.items()
    table = CliRunner().invoke(app, given).stdout
    assert "sim-0" in table
    assert "24.00 GiB" in table
    assert "simulated" in table

"""`arriero keys`, and the keys that commands send."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import Result
from pydantic import SecretStr
from typer.testing import CliRunner

from app.access import keys, operator_key
from app.api.services import Services
from app.catalog import files
from app.cli import app
from app.cli.client import RequestRefused, connected, key_of
from app.cli.processes import first_key, records
from app.cli.processes.records import TreeRecord
from app.devices.inventory import Devices
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.errors import InvalidSettings, NotFound
from app.kernel.sections.access import AccessSettings
from app.kernel.sections.servers import ApiSettings
from app.kernel.settings import Settings, load
from app.scheduler.operator_commands import OperatorCommands
from app.workflows.runs.service import Runs
from tests.cli.conftest import Arriero, serving


def test_a_key_is_created_listed_rotated_and_revoked(arriero: Arriero) -> None:
    created = arriero("keys", "create", "triage", "--scope", "submit", "--namespace", "research", "--expires", "30d")
    key = created.stdout.strip()
    key_id = keys.id_of(key)
    assert key_id is not None
    assert "not shown again" in created.stderr

    listed = arriero("keys", "list").stdout
    assert key_id in listed
    assert "research" in listed
    assert key not in listed + arriero("keys", "show", key_id).stdout
    rotated = arriero("keys", "rotate", key_id, "--overlap", "2h").stdout.strip()
    assert keys.id_of(rotated) == key_id
    assert rotated != key
    assert "rotating until" in arriero("keys", "list").stdout
    assert "is revoked" in arriero("keys", "revoke", key_id).stdout
    assert json.loads(arriero("keys", "show", key_id, "--json").stdout)["revoked_by"] == "local"


def test_commands_send_the_key_of_the_settings_and_show_it_nowhere(
    database: Database, publisher: CeleryPublisher, runs: Runs, tmp_path: Path, database_url: str
) -> None:
    settings = Settings(data_dir=tmp_path, access=AccessSettings(keys="required"))
    commands = OperatorCommands(database, lambda: None)
    services = Services(settings, database, publisher, runs, files.read_catalog(()), Devices(settings.fleet), commands)

    def run(*arguments: str) -> Result:
        result = CliRunner().invoke(app, ["--set", f"api.url={url}", *arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    with serving(services) as url:
        with pytest.raises(RequestRefused, match=r"an API key is needed.*ARRIERO_API__KEY"):
            run("runs", "list")
        # The first key comes from the database itself.
        direct = ("keys", "create", "first", "--scope", "read", "--scope", "admin", "--direct")
        key = run("--set", f"database_url={database_url}", *direct).stdout.strip()
        assert run("--set", f"api.key={key}", "runs", "list").exit_code == 0
        assert json.loads(run("--set", f"api.key={key}", "keys", "list", "--json").stdout)["keys"][0]["name"] == "first"
        shown = run("--set", f"api.key={key}", "config", "show", "api.key")
        assert key not in shown.stdout + shown.stderr
        with pytest.raises(RequestRefused, match="lacks the scope 'submit'"):
            run("--set", f"api.key={key}", "submit", "support-triage", "--input", "message=x")


@pytest.mark.parametrize("text", ["arr_x y", "arr_x\ny", "arr_ß", "arr_x\x1b"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(text: str) -> None:
    with pytest.raises(InvalidSettings, match="only letters, digits and underscores") as refused:
        load(environment={"ARRIERO_API__KEY": text})
    assert "arr_" not in str(refused.value)
    key = load(environment={"ARRIERO_API__KEY": " arr_x\n"}).settings.api.key
    assert key is not None
    assert key.get_secret_value() == "arr_x"
    assert load(environment={"ARRIERO_API__KEY": ""}).settings.api.key is None


def test_the_key_of_the_operator_goes_only_to_the_api_of_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    settings, own = Settings(data_dir=tmp_path), "http://127.0.0.1:8470"
    key = operator_key.create(tmp_path)
    assert (tmp_path / "run" / "operator.key").stat().st_mode & 0o777 == 0o600
    assert key_of(settings, own) is None  # nothing runs
    record = TreeRecord(1, "i", "v", api=own)
    monkeypatch.setattr(records, "running", lambda _: record)

    assert key_of(settings, own) == key
    assert key_of(settings, "https://elsewhere.example.com") is None
    with_key = settings.model_copy(update={"api": ApiSettings(key=SecretStr("arr_mine"))})
    assert key_of(with_key, own) == "arr_mine"
    operator_key.remove(tmp_path)
    assert operator_key.read(tmp_path) is None


def test_the_operator_needs_no_key_of_the_database(
    database: Database, publisher: CeleryPublisher, runs: Runs, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    key = operator_key.create(tmp_path)
    settings = Settings(data_dir=tmp_path, access=AccessSettings(keys="required"))
    commands = OperatorCommands(database, lambda: None)
    services = Services(settings, database, publisher, runs, files.read_catalog(()), Devices(settings.fleet), commands)
    with serving(services) as url:
        mine = settings.model_copy(update={"api": ApiSettings(url=url, key=SecretStr(key))})
        with connected(mine) as client:
            assert client.get("/v1/fleet")
            # The first admin key is created once.
            needed, first, _ = first_key.lines(url, tmp_path)
            made = re.search(r"arr_\w+", first)
            assert made is not None
            (listed,) = client.get("/v1/keys")["keys"]
            assert (listed["id"], listed["created_by"], len(listed["scopes"])) == (keys.id_of(made[0]), "operator", 4)
            assert first_key.lines(url, tmp_path) == [f"{needed} (`arriero keys list`)"]
        operator_key.remove(tmp_path)
        assert first_key.lines(url, tmp_path) == [first_key.NOT_NEEDED]


def test_commands_act_in_the_namespace_of_the_settings(arriero: Arriero, tmp_path: Path) -> None:
    file = tmp_path / "flow.yaml"
    file.write_text("workflow: flow\nsteps: [{id: a, kind: noop}]\n")
    research = ("--set", "api.namespace=research")

    assert "flow version 1" in arriero(*research, "workflows", "put", file).stdout
    assert "research/flow" in arriero("workflows", "list").stdout
    with pytest.raises(NotFound, match="no workflow 'flow'"):
        arriero("workflows", "show", "flow")
    with pytest.raises(NotFound, match="no workflow 'flow'"):
        arriero("submit", "flow")
    run_id = arriero(*research, "submit", "flow").stdout.strip()
    assert run_id in arriero(*research, "runs", "list").stdout
    assert run_id not in arriero("--set", "api.namespace=other", "runs", "list").stdout

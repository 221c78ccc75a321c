"""`arriero hosts invite` and `arriero agent join`: a host gets its configuration, and its agent can use it."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

import pytest
from pydantic import SecretStr
from sqlalchemy import text
from typer.testing import CliRunner

from app.access.agents import invitation
from app.cli import app
from app.cli.client import Client
from app.cli.processes.agent import AgentConfiguration, config_text
from app.kernel.database import Database
from app.kernel.errors import Conflict, InvalidInput
from app.kernel.sections.agents import AgentSettings
from app.kernel.settings import Settings, load
from tests.cli.conftest import Arriero


@pytest.fixture
def settings(tmp_path: Path, database: Database, redis_url: str) -> Settings:
    urls = {"database_url": SecretStr(database.url), "redis_url": SecretStr(redis_url)}
    return Settings(data_dir=tmp_path / "api", agents=AgentSettings(redis_url=redis_url), **urls)


@pytest.fixture
def url(arriero: Arriero, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of the API that the command talks to."""
    seen: list[str] = []
    original = Client.__init__

    def noting(self: Client, url: str, *arguments: object, **named: object) -> None:
        seen.append(url)
        original(self, url, *arguments, **named)  # type: ignore[arg-type] # they are passed on

    monkeypatch.setattr(Client, "__init__", noting)
    arriero("hosts", "invitations")
    return seen[0]


def test_a_host_joins_by_one_command(arriero: Arriero, url: str, database: Database, tmp_path: Path) -> None:
    made = arriero("hosts", "invite", "gpu-1", "--expires", "10m")
    token = made.stdout.strip()
    assert invitation.id_of(token)
    assert "arriero agent join" in made.stderr
    home = tmp_path / "gpu-1"
    line = ["--set", f"data_dir={home}", "agent", "join", url, "--token-file", "-", "--host", "gpu-1"]
    result = CliRunner().invoke(app, line, input=token + "\n")
    assert result.exit_code == 0, result.output
    assert "has joined" in result.stdout
    file = home / "arriero.toml"
    assert file.stat().st_mode & 0o777 == 0o600
    loaded = load(config=file, environment={}).settings
    assert (loaded.fleet.host, loaded.data_dir, loaded.api.url) == ("gpu-1", home, url)
    assert loaded.database_url is not None
    agent = Database(loaded.database_url.get_secret_value(), pool_size=1)
    agent.require_head()
    with agent.work() as work:
        assert work.row(text("SELECT agent_host() AS host")) == ("gpu-1",)
    agent.close()
    assert "gpu-1" in arriero("hosts", "invitations").stdout

    again = CliRunner().invoke(app, line, input=token)
    assert isinstance(again.exception, Conflict)
    assert "--replace" in str(again.exception)
    used = CliRunner().invoke(app, [*line, "--replace"], input=token)
    assert "was used by host gpu-1" in str(used.exception)
    assert not list(home.glob(".joining*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["http://db.example.com:8470", "--token", "TOKEN"], "readable on the network"),
        (["ftp://localhost", "--token", "TOKEN"], "no address of an API"),
        (["https://u:p@localhost", "--token", "TOKEN"], "no address of an API"),
        (["http://localhost:1", "--token", "join_x"], "has not the form of a token"),
        (["http://localhost:1"], "give --token or --token-file"),
        (["http://localhost:1", "--token", "TOKEN", "--host", "a b"], "no name of a host"),
    ],
)
def test_what_cannot_work_is_refused_before_the_token_is_sent(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    token = invitation.compose("0" * 10, "x" * 43)
    line = [part.replace("TOKEN", token) for part in arguments]
    result = CliRunner().invoke(app, ["--set", f"data_dir={tmp_path / 'x'}", "agent", "join", *line])
    assert isinstance(result.exception, InvalidInput)
    assert message in str(result.exception)
    assert not (tmp_path / "x").exists()


def test_certificates_are_named_where_tls_is_used(tmp_path: Path) -> None:
    """The text is valid TOML whatever the addresses have in them."""
    found = AgentConfiguration(
        "gpu-1", "postgresql://r:p%22w@db/arriero?sslmode=verify-full", "rediss://u:p@v:6379/0", "-----"
    )
    file = tmp_path / "arriero.toml"
    file.write_text(config_text(found, "https://a.example", tmp_path, tmp_path / "c.pem"))
    loaded = load(config=file, environment={}).settings
    assert loaded.database_url is not None
    assert loaded.redis_url is not None
    database_url = unquote(loaded.database_url.get_secret_value())
    assert database_url.endswith(f"sslmode=verify-full&sslrootcert={tmp_path}/c.pem")
    assert loaded.redis_url.get_secret_value() == f"rediss://u:p@v:6379/0?ssl_ca_certs={tmp_path}/c.pem"
    assert loaded.api.ca_file == tmp_path / "c.pem"

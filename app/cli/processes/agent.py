"""`arriero agent`: the agent of this host, and how a host joins an installation."""

from __future__ import annotations

import json
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from app.access.agents import invitation, passwords
from app.access.keyless import is_loopback
from app.cli.client import Client
from app.cli.output import AsJson, console, print_json, settings_of
from app.cli.processes.programs import WORKERS, become
from app.kernel import ids
from app.kernel.errors import Conflict, InvalidInput, Problem, Unavailable
from app.kernel.processes import private_file
from app.kernel.processes.data_directory import make_directory
from app.kernel.settings import CONFIG_FILE

app = typer.Typer(
    no_args_is_help=False,
    help="Run the agent of this host: it registers the host's devices, and starts and stops the pools on them.\n\n"
    "One agent runs on each host; fleet.host names the host. On SIGTERM its pools may finish their steps within "
    "pools.drain_timeout; the other steps are requeued. When the agent is killed, its pools continue, and the next "
    "agent on the same data directory adopts them.",
)

#: The file of the certificates to trust, in the data directory.
_CERTIFICATES = "certificates.pem"
_HOST = re.compile(invitation.HOST, re.ASCII)


@dataclass(frozen=True, slots=True)
class AgentConfiguration:
    """What a host gets that joins, with the password that it has chosen."""

    host: str
    database_url: str
    redis_url: str
    certificates: str


@app.callback(invoke_without_command=True)
def agent(context: typer.Context) -> None:
    """Run the agent, unless a subcommand is given."""
    if context.invoked_subcommand is None:
        become(settings_of(context), [WORKERS, "agent"])


@app.command()
def join(
    context: typer.Context,
    url: Annotated[str, typer.Argument(help="The API of the installation: https://arriero.example.com.")],
    token: Annotated[str, typer.Option(help="The token of `arriero hosts invite`; other users may see it.")] = "",
    token_file: Annotated[Path | None, typer.Option(help="A file with the token; `-` reads standard input.")] = None,
    host: Annotated[str, typer.Option(help="The name of this host; by default fleet.host, or its network name.")] = "",
    ca_file: Annotated[Path | None, typer.Option(help="Certificates (PEM) to trust for the API.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace the configuration of this data directory.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """
    Join an installation: exchange a token for the configuration of this host's agent.

    The configuration is written to arriero.toml in the data directory (mode 0600), with the certificates beside it.
    Then `arriero agent` runs with it.
    """
    settings = settings_of(context)
    given = _token(token, token_file)
    name = host or settings.fleet.host_here or platform.node()
    _check(url, name)
    directory = settings.data_dir
    file = directory / CONFIG_FILE
    if file.exists() and not replace:
        raise Conflict(f"{file} exists: this host has a configuration; --replace writes another one")
    make_directory(directory)
    private_file.write(directory / ".joining", "")  # before the token is used: the directory can be written
    password = ids.new_secret()
    body = {"token": given, "host": name, "verifier": passwords.verifier(password, ids.new_salt())}
    api = settings.api.model_copy(update={"ca_file": ca_file.absolute()}) if ca_file else settings.api
    client = Client(url, api=api)
    try:
        found = _configuration(client.post("/v1/hosts/join", body), password)
    finally:
        client.close()
        (directory / ".joining").unlink(missing_ok=True)
    trusted = found.certificates or ("" if ca_file is None else ca_file.read_text(encoding="ascii"))
    certificates = directory / _CERTIFICATES if trusted else None
    if certificates is not None:
        private_file.write(certificates, trusted)
    private_file.write(file, config_text(found, url, directory, certificates))
    if as_json:
        print_json({"host": found.host, "config": str(file), "certificates": certificates and str(certificates)})
        return
    console().print(f"{found.host} has joined {url}; its configuration is {file}", soft_wrap=True)
    console().print(f"Start its agent: arriero --config {file} agent", soft_wrap=True)


def config_text(found: AgentConfiguration, url: str, directory: Path, certificates: Path | None) -> str:
    """Return the text of arriero.toml for an agent."""
    database, broker = make_url(found.database_url), found.redis_url
    if certificates is not None:
        if database.query.get("sslmode") in ("verify-ca", "verify-full"):
            database = database.update_query_dict({"sslrootcert": str(certificates)})
        if broker.startswith(("rediss://", "valkeys://")):
            broker += f"{'&' if '?' in broker else '?'}ssl_ca_certs={certificates}"
    lines = [
        "# Written by `arriero agent join`. It has passwords: keep its mode 0600.",
        f"data_dir = {_toml(str(directory))}",
        f"database_url = {_toml(database.render_as_string(hide_password=False))}",
        f"redis_url = {_toml(broker)}",
        "",
        "[fleet]",
        f"host = {_toml(found.host)}",
        "",
        "[api]",
        f"url = {_toml(url)}",
        *([f"ca_file = {_toml(str(certificates))}"] if certificates is not None else []),
        "",
        "[tls]",
        'servers = "require"',
    ]
    return "\n".join(lines) + "\n"


def _token(token: str, file: Path | None) -> str:
    """Return the token of the options. Raises InvalidInput."""
    if bool(token) == (file is not None):
        raise _invalid("token", "give --token or --token-file", "one of both")
    if file is not None:
        try:
            token = sys.stdin.read(1_000) if str(file) == "-" else file.read_text(encoding="ascii")[:1_000]
        except (OSError, UnicodeDecodeError) as error:
            raise _invalid("token-file", f"{file} cannot be read: {error}") from None
    token = token.strip()
    if invitation.id_of(token) is None:
        raise _invalid("token", "has not the form of a token", "join_…, as `arriero hosts invite` prints it")
    return token


def _check(url: str, host: str) -> None:
    """Check where the token would be sent, and by which name. Raises InvalidInput."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise _invalid("url", f"{url!r} is no address of an API", "https://arriero.example.com")
    is_near = parts.hostname == "localhost" or is_loopback(parts.hostname)
    if parts.scheme != "https" and not is_near:
        raise _invalid("url", "the token would be readable on the network", "an address that begins with https://")
    if _HOST.fullmatch(host) is None:
        raise _invalid("host", f"{host!r} is no name of a host", "letters, digits, '.', '_', '-'; at most 100")


def _configuration(answer: Any, password: str) -> AgentConfiguration:
    """Check the answer of an API. Raises Unavailable."""
    fields = ("host", "database_url", "redis_url", "certificates")
    if not isinstance(answer, dict) or not all(isinstance(answer.get(one), str) for one in fields):
        raise Unavailable("the API has answered with something that is no configuration")
    try:
        database = make_url(answer["database_url"]).set(password=password)
    except (ArgumentError, ValueError):
        raise Unavailable("the API has answered with a database_url that is no address") from None
    return AgentConfiguration(
        answer["host"], database.render_as_string(hide_password=False), answer["redis_url"], answer["certificates"]
    )


def _toml(value: str) -> str:
    return json.dumps(value)  # a string is written alike in JSON and TOML


def _invalid(where: str, message: str, accepted: str = "") -> InvalidInput:
    return InvalidInput([Problem(where, message, accepted)], "options")

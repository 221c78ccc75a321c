"""Checks of what is installed: Python, packages, shipped files, ports, the engine, and the servers."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.resources
import json
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import redis
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from sqlalchemy import text

from app import __version__
from app.catalog import files
from app.cli.doctor import servers as running_servers
from app.cli.doctor.finding import Finding, ok, problem, warning
from app.cli.lifecycle import installation
from app.cli.lifecycle.installation import UP
from app.cli.processes.programs import WORKERS
from app.kernel import addresses, broker, clock, embedded, shipped
from app.kernel.database import Database, head_revision
from app.kernel.errors import ServerNotStarted
from app.kernel.processes import listening
from app.kernel.processes.data_directory import DataDirectory
from app.kernel.settings import Settings, values_of, variable
from app.workflows import registry

_DISTRIBUTION = "arriero"
#: Seconds for the engine's process: it imports, loads and generates; a busy machine takes several times as long.
_ENGINE_SECONDS = 120.0
#: The program that loads a tiny model: a wrong build of llama.cpp may end its process.
_SELF_TEST = (sys.executable, "-P", "-m", WORKERS, "self-test")
_REINSTALL = f"pip install --force-reinstall {_DISTRIBUTION}=={__version__}"


def python(_: Settings) -> Iterator[Finding]:
    """The version of Python."""
    needed = importlib.metadata.metadata(_DISTRIBUTION)["Requires-Python"]
    found = platform.python_version()
    detail = f"{platform.python_implementation()} {found} on {platform.system()} {platform.machine()}"
    if SpecifierSet(needed).contains(found, prereleases=True):
        yield ok("python", detail)
    else:
        yield problem("python", f"{detail}; {needed} is needed", "install Arriero with another Python")


def packages(_: Settings) -> Iterator[Finding]:
    """The packages that this version requires, and its extras."""
    required = [Requirement(line) for line in importlib.metadata.requires(_DISTRIBUTION) or ()]
    plain = [one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = [sentence for one in plain if (sentence := _unmet(one))]
    for sentence in wrong:
        yield problem("packages", sentence, f"pip install --upgrade {_DISTRIBUTION}, in this environment")
    if not wrong:
        yield ok("packages", f"arriero {__version__} and all {len(plain)} packages that it requires")
    listed = importlib.metadata.metadata(_DISTRIBUTION).get_all("Provides-Extra") or []
    names = [name for name in listed if name != "dev"]
    extras = {
        name: [one for one in required if one.marker and one.marker.evaluate({"extra": name}) and one not in plain]
        for name in names
    }
    here = [name for name, of in sorted(extras.items()) if of and not any(_unmet(one) for one in of)]
    yield ok("packages", f"extras: {', '.join(here) or 'none'} of {', '.join(sorted(extras))}")


def shipped_files(_: Settings) -> Iterator[Finding]:
    """The files that are shipped with the code: migrations, the catalogue, workflows, and the dashboard."""
    pages = Path(str(importlib.resources.files("app"))) / "api" / "ui"
    counts = {
        "templates": len(list((pages / "templates").glob("*.html"))),
        "static files": len([one for one in (pages / "static").iterdir() if one.is_file()]),
        "examples": len(list(shipped.folder("examples").glob("*"))),
        "workflows": len(registry.shipped()),
        "models": len(files.read_catalog().names),
    }
    missing = [name for name, count in counts.items() if not count]
    if missing:
        yield problem("files", f"the installation has no {', '.join(missing)}", _REINSTALL)
    else:
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        yield ok("files", f"migrations up to {head_revision()}, {found}")


def known_settings(settings: Settings) -> Iterator[Finding]:
    """The settings. Invalid ones end every command before it begins, with the problem."""
    changed = [key for key, value in values_of(settings) if value != dict(values_of(type(settings)()))[key]]
    yield ok("settings", f"valid; set: {', '.join(changed[:12]) or 'none'}{' …' * (len(changed) > 12)}")


def ports(settings: Settings) -> Iterator[Finding]:
    """Whether API and Flower can listen where the settings say."""
    is_up = installation.read(settings.data_dir, clock.now()).running(UP) is not None
    for name, host, port in (
        ("api", settings.api.host, settings.api.port),
        ("flower", settings.flower.host, settings.flower.port),
    ):
        if not port:
            yield ok("ports", f"{name}.port is 0: a free one is chosen")
        elif is_up:
            yield ok("ports", f"port {port} ({name}.port) is held by the `arriero up` of this data directory")
        else:
            try:
                listening.listen(name, host, port, f"{name}.port").close()
            except ServerNotStarted as error:
                yield problem("ports", str(error), f"{variable(f'{name}.port')}=0, or another port")
            else:
                yield ok("ports", f"port {port} ({name}.port) is free")


def engine(_: Settings) -> Iterator[Finding]:
    """Whether llama.cpp loads a model and generates, in a process of its own."""
    rebuild = f"{sys.executable} -m pip install --force-reinstall --no-deps --no-cache-dir llama-cpp-python"
    try:
        done = subprocess.run(_SELF_TEST, capture_output=True, text=True, timeout=_ENGINE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        yield problem("engine", f"a model of 100 kB was not served within {_ENGINE_SECONDS:g} s", rebuild)
        return
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it wrote nothing"]
        if done.returncode == -signal.SIGILL:
            detail = "llama.cpp uses instructions that this processor lacks (SIGILL): it was built for another machine"
        elif done.returncode < 0:
            detail = f"llama.cpp ended by {signal.Signals(-done.returncode).name}: {last[0]}"
        else:
            detail = f"llama.cpp does not work: {last[0]}"
        yield problem("engine", detail, rebuild)
        return
    answer = json.loads(done.stdout.splitlines()[-1])
    yield ok(
        "engine",
        f"llama.cpp loaded a model of {answer['bytes'] / 1000:.0f} kB in {answer['load_seconds']:.2f} s and "
        f"generated {answer['tokens']} tokens in {answer['generate_seconds']:.2f} s",
    )


def servers(settings: Settings) -> Iterator[Finding]:
    """Postgres and the broker: those of the settings, those that run here, or embedded ones for the moment."""
    has_database, has_broker = (find(settings) is not None for find in (addresses.find_database, addresses.find_redis))
    if has_database:
        yield from running_servers.database(settings)
    if has_broker:
        yield from running_servers.valkey(settings)
    if has_database and has_broker:
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="arriero-self-check-", ignore_cleanup_errors=True) as folder:
        yield from _embedded(Path(folder), postgres=not has_database, valkey=not has_broker, began=began)


def _embedded(folder: Path, *, postgres: bool, valkey: bool, began: float) -> Iterator[Finding]:
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(DataDirectory(folder, now=clock.now(), command="arriero self-check"))
        try:
            started = stack.enter_context(embedded.started(held, postgres=postgres, valkey=valkey))
        except ServerNotStarted as error:
            yield problem("servers", str(error), "pip install 'arriero[embedded]', or set the URLs of servers")
            return
        seconds = time.monotonic() - began
        if started.postgres is not None:
            database = Database(started.postgres.url, pool_size=1)
            stack.callback(database.close)
            with database.work() as work:
                work.run(text("CREATE EXTENSION IF NOT EXISTS vector"))
                row = work.row(text("SELECT current_setting('server_version') AS version"))
            assert row is not None
            yield ok("servers", f"an embedded Postgres {row.version} with pgvector started within {seconds:.1f} s")
        if started.valkey is not None:
            client = broker.connect(started.valkey.url)
            stack.callback(client.close)
            try:
                client.ping()
            except redis.RedisError as error:
                yield warning("servers", f"the embedded Valkey does not answer: {error}", "run it again")
            else:
                yield ok("servers", f"an embedded Valkey started within {seconds:.1f} s")


def _unmet(requirement: Requirement) -> str:
    """Return what is wrong with an installed package; empty when it meets the requirement."""
    try:
        found = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed; {requirement.specifier or 'any version'} is needed"
    if requirement.specifier.contains(found, prereleases=True):
        return ""
    return f"{requirement.name} is {found}; {requirement.specifier} is needed"

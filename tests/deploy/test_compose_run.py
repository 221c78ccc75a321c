"""
The programs of deploy/compose.yaml, run on this machine as the file says: commands, environments, order, health checks.

Embedded servers stand for the images of Postgres and Valkey, folders for volumes, and loopback for the networks. Until
every health check passes nothing is sent; then a call is answered by a pool and a run completes; then each program has
its grace period to stop.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import httpx2
import pytest

from app.kernel import clock, embedded
from app.kernel.embedded import DataDirectory
from tests.deploy import compose_file
from tests.deploy.compose_file import ROOT, ComposeService

pytestmark = [pytest.mark.storm, pytest.mark.timeout(900)]

#: A busy machine starts programs ten times as slowly as a quiet one.
LIMIT = 300.0


class Stack:
    """The services of the profile `cpu` that are Arriero's, as processes."""

    def __init__(self, folder: Path, postgres: str, valkey: str) -> None:
        self.folder = folder
        self.services = {n: s for n, s in compose_file.services("cpu").items() if s.is_arriero}
        self.running: list[tuple[ComposeService, subprocess.Popen[bytes]]] = []
        self.ports = {"api": free_port(), "flower": free_port(), "metrics": free_port()}
        self._secrets(postgres, valkey)

    def _secrets(self, postgres: str, valkey: str) -> None:
        spec = importlib.util.spec_from_file_location("make_secrets", ROOT / "deploy/compose/make_secrets.py")
        assert spec is not None
        assert spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
        made.make(self.folder / "secrets")
        (self.folder / "secrets/database_url").write_text(f"{postgres}\n")
        (self.folder / "secrets/redis_url").write_text(f"{valkey}\n")

    def environment(self, service: ComposeService, number: int = 0) -> dict[str, str]:
        """The environment of the file, with this machine's places and ports instead of those of a container."""
        data = self.folder / "volumes" / f"{service.name}-{number}"
        data.mkdir(parents=True, exist_ok=True)
        places = {"/run/secrets": str(self.folder / "secrets"), "/var/lib/arriero": str(data), "0.0.0.0": "127.0.0.1"}
        found = {}
        for name, value in service.environment.items():
            for place, here in places.items():
                value = value.replace(place, here)
            found[name] = value
        # Of the image, and of this machine: ports that nobody else has.
        found |= {"PATH": os.environ["PATH"], "HOME": str(data), "ARRIERO_API__PORT": str(self.ports["api"])}
        found |= {"ARRIERO_FLOWER__PORT": str(self.ports["flower"])}
        if "ARRIERO_CONTROL__METRICS_PORT" in found:
            found["ARRIERO_CONTROL__METRICS_PORT"] = str(self.ports["metrics"])
        if sys.prefix != sys.base_prefix:
            found["VIRTUAL_ENV"] = sys.prefix
        return found | {"PYTHONPATH": str(ROOT)}

    def run(self, service: ComposeService, *words: str) -> subprocess.CompletedProcess[str]:
        """What `docker compose run` does: another command in the place of the service's own."""
        return subprocess.run(
            [sys.executable, "-m", "app", *words], env=self.environment(service), cwd=self.folder,
            capture_output=True, text=True, timeout=LIMIT, check=False,
        )  # fmt: skip

    def up(self) -> None:
        """Start everything in its order, each service when those that it waits for are as the file says."""
        for service in compose_file.in_order(
            {n: ComposeService(n, {**s.document, "depends_on": {
                other: of for other, of in s.document.get("depends_on", {}).items() if other in self.services
            }}) for n, s in self.services.items()}
        ):  # fmt: skip
            for other, condition in service.after.items():
                assert condition in ("service_completed_successfully", "service_healthy")
                if condition == "service_healthy":
                    self.wait_until_healthy(self.services[other])
            if service.health is None:
                done = self.run(service, *service.command)
                assert done.returncode == 0, done.stderr
                continue
            for number in range(service.replicas):
                log = (self.folder / f"{service.name}-{number}.log").open("wb")
                process = subprocess.Popen(
                    [sys.executable, "-m", "app", *service.command], env=self.environment(service, number),
                    cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
                log.close()
                self.running.append((service, process))

    def wait_until_healthy(self, service: ComposeService) -> None:
        """Run the health check of the file until it passes."""
        assert service.health is not None
        limit, said = time.monotonic() + LIMIT, ""
        while time.monotonic() < limit:
            for of, process in self.running:
                assert process.poll() is None, f"{of.name} ended: {self.log(of)}"
            done = self.run(service, *service.health[2:])
            if done.returncode == 0:
                return
            said = done.stdout + done.stderr
        raise AssertionError(f"{service.name} did not become healthy: {said}\n{self.log(service)}")

    def log(self, service: ComposeService) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob(f"{service.name}-*.log")))

    def down(self) -> dict[str, float]:
        """Stop as Compose does. Returns the seconds that each service took."""
        took = {}
        for service, process in reversed(self.running):
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(service.grace.total_seconds() + 60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            took[service.name] = max(took.get(service.name, 0.0), time.monotonic() - began)
        return took


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    with ExitStack() as undo:
        held = undo.enter_context(DataDirectory(tmp_path / "servers", now=clock.now(), command="tests"))
        servers = undo.enter_context(embedded.started(held, deadline=timedelta(minutes=3)))
        assert servers.postgres is not None
        assert servers.valkey is not None
        made = Stack(tmp_path, servers.postgres.url, servers.valkey.url)
        undo.callback(made.down)
        yield made


def test_the_file_starts_an_installation_that_answers_and_stops_in_time(stack: Stack) -> None:
    stack.up()
    for service in stack.services.values():
        if service.health is not None:
            stack.wait_until_healthy(service)

    api = f"http://127.0.0.1:{stack.ports['api']}"
    refused = httpx2.get(f"{api}/v1/runs", timeout=60, trust_env=False)
    assert refused.status_code == 401, "the file asks for keys"
    # The command at the head of the file.
    line = next(one for one in compose_file.FILE.read_text().splitlines() if "keys create" in one)
    words = line.partition(" migrate ")[2].split()
    created = stack.run(stack.services["migrate"], *words, "--json")
    assert created.returncode == 0, created.stderr
    headers = {"Authorization": f"Bearer {json.loads(created.stdout)['key']}"}
    with httpx2.Client(base_url=api, headers=headers, timeout=LIMIT, trust_env=False) as client:
        body = {"model": "smollm2:135m", "messages": [{"role": "user", "content": "Say hi"}], "max_tokens": 8}
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] > 0
        definition = {
            "workflow": "compose",
            "inputs": {"word": {"type": "string"}},
            "steps": [{"id": "say", "kind": "transform", "cel": "inputs.word"}],
            "outputs": {"said": "steps.say.output"},
        }
        sent = client.post("/v1/runs", json={"definition": definition, "inputs": {"word": "hola"}})
        assert sent.status_code == 202, sent.text
        run = sent.json()
        limit = time.monotonic() + LIMIT
        while run["state"] not in ("succeeded", "failed", "cancelled") and time.monotonic() < limit:
            run = client.get(f"/v1/runs/{run['id']}").json()
        assert run["state"] == "succeeded", run
        assert client.get("/metrics").status_code == 200
    metrics = httpx2.get(f"http://127.0.0.1:{stack.ports['metrics']}/metrics", timeout=60, trust_env=False)
    assert metrics.status_code == 200, "what Prometheus scrapes of control workers"

    took = stack.down()
    late = {n: s for n, s in took.items() if s > stack.services[n].grace.total_seconds() * 2}
    assert late == {}, "twice the time of the file, on a machine that others keep busy"

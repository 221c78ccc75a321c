"""The metrics of a pool with a real engine, scraped over HTTP."""

from __future__ import annotations

import json
import os
import socket
import threading
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.fleet.pool import PoolPhase
from app.inference.requests import GenerateRequest, PriorityClass, Sampling
from app.kernel.errors import ServerNotStarted
from workers.engine.engine import LlamaEngine
from workers.engine.options import EngineOptions
from workers.pool import exporter
from workers.pool.exporter import PoolCollector
from workers.pool.progress import Status

LABELS = {"model": "tiny:1m", "device": "cpu", "worker": "pool.tiny-1m@here"}


class Scrape:
    """A scrape of a pool's metrics."""

    def __init__(self, data_dir: Path) -> None:
        (found,) = json.loads((data_dir / "metrics" / "pool.tiny-1m.json").read_text())
        (self.target,) = found["targets"]
        answer = httpx2.get(f"http://{self.target}/metrics", trust_env=False)
        families = list(text_string_to_metric_families(answer.text))
        self.types = {family.name: family.type for family in families}
        self.samples = [sample for family in families for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        (found,) = (sample for sample in self.samples if sample.name == name and sample.labels == LABELS | labels)
        return float(found.value)


@pytest.fixture
def status() -> Status:
    return Status("tiny:1m")


def serving(status: Status, data_dir: Path, port: int = 0) -> AbstractContextManager[PoolCollector]:
    return exporter.serving("pool.tiny-1m", status, LABELS, host="127.0.0.1", port=port, data_dir=data_dir)


def request_of(prompt: str, tokens: int = 6, priority: PriorityClass = PriorityClass.STANDARD) -> GenerateRequest:
    sampling = Sampling(temperature=0, ignore_end=True)
    return GenerateRequest(prompt=prompt, max_tokens=tokens, sampling=sampling, priority=priority)


def test_metrics_are_served_from_before_the_load_until_the_exit(
    tiny_llama: Path, status: Status, tmp_path: Path
) -> None:
    halves: list[float] = []

    def progress(loaded: float) -> None:
        status.note_progress(loaded)
        if 0 < loaded < 1 and not halves:
            halves.append(Scrape(tmp_path)("arriero_pool_loaded_ratio"))

    with serving(status, tmp_path) as exported:
        before = Scrape(tmp_path)
        assert before("arriero_pool_phase", phase="starting") == 1
        assert before("arriero_pool_loaded_ratio") == 0
        assert not any(sample.name.startswith("arriero_engine") for sample in before.samples)

        engine = LlamaEngine(tiny_llama, EngineOptions(slots=2, context=1024, threads=1), on_progress=progress)
        exported.engine = engine
        status.enter(PoolPhase.SERVING)
        assert 0 < halves[0] < 1
        text = "A long walk in the mountains of Peru with three llamas. " * 5
        results = [engine.generate(request_of(text)).result(30) for _ in range(2)]
        engine.generate(GenerateRequest(prompt="a", max_tokens=9, grammar='root ::= "yes" | "no"')).result(30)
        cancelled = engine.generate(request_of("b", 900))
        cancelled.cancel()
        with pytest.raises(CancelledError):
            cancelled.result(30)

        now = Scrape(tmp_path)
        assert now("arriero_pool_phase", phase="serving") == 1
        assert now("arriero_pool_loaded_ratio") == 1
        assert now("arriero_engine_requests_ended_total", outcome="finished") == 3
        assert now("arriero_engine_requests_ended_total", outcome="cancelled") == 1
        assert now("arriero_engine_prompt_tokens_total", source="reused") == results[1].tokens_cached > 0
        assert now("arriero_engine_prefix_hits_total") >= 1
        assert now("arriero_engine_written_tokens_total") == engine.metrics().tokens_out >= 12
        assert now("arriero_engine_grammars_compiled_total") == 1
        assert now("arriero_engine_queue_wait_seconds_bucket", le="+Inf") == engine.metrics().admitted
        assert now("arriero_engine_queue_wait_seconds_count") >= 3
        assert (now("arriero_engine_slots"), now("arriero_engine_running")) == (2, 0)
        assert now("arriero_engine_kv_cells_used") > 0
        assert now("arriero_engine_stalled_seconds") == 0
        assert now.types["arriero_engine_queue_wait_seconds"] == "histogram"
        assert any(sample.name == "process_resident_memory_bytes" for sample in now.samples)
        engine.close()
        status.enter(PoolPhase.UNLOADING)
        assert Scrape(tmp_path)("arriero_pool_phase", phase="unloading") == 1
    assert not (tmp_path / "metrics" / "pool.tiny-1m.json").exists()
    with pytest.raises(httpx2.TransportError):
        httpx2.get(f"http://{now.target}/metrics", trust_env=False)


def test_parked_and_waiting_requests_are_exported(tiny_llama: Path, status: Status, tmp_path: Path) -> None:
    engine = LlamaEngine(tiny_llama, EngineOptions(slots=1, context=4096, threads=1))
    try:
        with serving(status, tmp_path) as exported:
            exported.engine = engine
            started = threading.Event()
            tickets = [
                engine.generate(request_of("a b c", 1900, PriorityClass.BATCH), lambda _: started.set()) for _ in "12"
            ]
            assert started.wait(30)
            engine.generate(request_of("d e f", 5, PriorityClass.INTERACTIVE)).result(60)
            now = Scrape(tmp_path)
            assert now("arriero_engine_requests_parked_total") == 1
            assert now("arriero_engine_waiting") >= 1
            for ticket in tickets:
                ticket.cancel()
    finally:
        engine.close()


def test_a_port_that_is_taken_is_named(status: Status, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(
                ServerNotStarted,
                match=rf"port {port} on 127\.0\.0\.1, its setting pools\.metrics_port .*process {os.getpid()} ",
            ),
            serving(status, tmp_path, port),
        ):
            pass


def test_pages_of_other_sites_cannot_read_the_metrics(status: Status, tmp_path: Path) -> None:
    with serving(status, tmp_path):
        url = f"http://{Scrape(tmp_path).target}/metrics"
        for headers in ({"Host": "evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
            answer = httpx2.get(url, headers=headers, trust_env=False)
            assert answer.status_code == 403
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["errors"][0]["where"] == next(iter(headers))
            assert repr(*headers.values()) in answer.json()["detail"]
        assert httpx2.get(url, headers={"Host": "localhost:1"}, trust_env=False).status_code == 200


def test_a_pool_is_scraped_by_the_name_and_the_address_of_its_host(status: Status, tmp_path: Path) -> None:
    hosts = ("prometheus.example.com",)
    with exporter.serving(
        "pool.tiny-1m", status, LABELS, host="0.0.0.0", port=0, data_dir=tmp_path, trusted_hosts=hosts
    ):
        (found,) = json.loads((tmp_path / "metrics" / "pool.tiny-1m.json").read_text())
        name, port = found["targets"][0].rsplit(":", 1)
        for host in (name, "127.0.0.2", *hosts):
            answer = httpx2.get(f"http://127.0.0.2:{port}/metrics", headers={"Host": host}, trust_env=False)
            assert answer.status_code == 200, host


def test_a_silent_client_delays_no_other(status: Status, tmp_path: Path) -> None:
    with serving(status, tmp_path):
        scrape = Scrape(tmp_path)
        host, port = scrape.target.rsplit(":", 1)
        with socket.create_connection((host, int(port))) as silent:
            assert Scrape(tmp_path)("arriero_pool_phase", phase="starting") == 1
            silent.settimeout(60)
            assert silent.recv(1) == b"", "the connection is closed"

"""The measurement of a pool's memory: estimates, measured footprints, growth, and out-of-memory failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from app.catalog import catalog, files, header
from app.devices import llama_build
from app.devices.device import DeviceProcess, GpuBackend, HardwareKind, Inventory, MeasuredDevice
from app.devices.inventory import Devices
from app.footprint import closed_form, estimate, measurements
from app.footprint.configuration import LoadConfiguration, of_model
from app.footprint.footprint import HOST, MIB, Footprint, FootprintSource
from app.kernel import settings
from app.kernel.database import Database
from app.kernel.errors import AllocationFailed, MemoryNotEnough, Unavailable
from app.kernel.settings import Settings
from benchmarks import footprint as benchmark
from workers.engine.bindings import visible
from workers.engine.bindings.visible import VisibleGpu
from workers.engine.engine import LlamaEngine
from workers.engine.options import EngineOptions
from workers.pool import measurement, pool
from workers.pool.measurement import Measuring

pytestmark = pytest.mark.slow

SMOLLM2 = files.read_catalog().get("smollm2:135m")
OPTIONS = EngineOptions(slots=2, context=1024, threads=1, park_bytes=0, store_bytes=0, vectors=False)


@pytest.fixture(scope="session")
def path() -> Path:
    return files.locate(SMOLLM2, Path())


@pytest.fixture
def host(database: Database, redis_url: str, tmp_path: Path) -> Settings:
    given = {"DATABASE_URL": database.url, "REDIS_URL": redis_url, "DATA_DIR": str(tmp_path)}
    return settings.load(environment={f"ARRIERO_{name}": value for name, value in given.items()}).settings


@pytest.fixture
def one(host: Settings, path: Path, database: Database) -> Iterator[Measuring]:
    with closing(Measuring(host, database, header.read(path), OPTIONS, "cpu")) as made:
        yield made


def new_estimate(host: Settings, path: Path, database: Database) -> estimate.Estimate:
    """A new estimate of the same load."""
    with closing(Measuring(host, database, header.read(path), OPTIONS, "cpu")) as made:
        return estimate.estimate(made._identity, made._database, made._host, allow_dry_run=False)


def test_a_measured_footprint_is_used_by_the_next_estimate(
    one: Measuring, host: Settings, path: Path, database: Database
) -> None:
    expected = one.expect()
    assert expected.source is FootprintSource.DRY_RUN
    with one.loading():
        engine = LlamaEngine(path, OPTIONS)
    kept = one.keep(engine)
    resident = sum(measurement._memory() or ())
    engine.close()

    assert kept is not None
    found = new_estimate(host, path, database)
    assert [footprint.source for footprint in found.footprints] == [
        FootprintSource.MEASURED,
        FootprintSource.DRY_RUN,
        FootprintSource.CLOSED_FORM,
    ]
    assert found.best == kept
    for part in ("weights", "cache", "compute", "output"):
        assert getattr(kept.shares[0], part) == getattr(expected.shares[0], part)
    # The memory of this process before the load counts too; buffers count in full, although they are hardly used.
    assert resident <= kept.shares[0].total <= resident + kept.shares[0].compute + 40 * MIB


def test_a_dry_run_is_done_once(
    one: Measuring, host: Settings, path: Path, monkeypatch: pytest.MonkeyPatch, database: Database
) -> None:
    one.expect()
    monkeypatch.setattr(estimate, "_PROBE", "no_such_module")
    with closing(Measuring(host, database, header.read(path), OPTIONS, "cpu")) as second:
        assert second.expect().source is FootprintSource.DRY_RUN


def test_out_of_memory_raises_the_margin_of_the_next_estimate(
    one: Measuring, host: Settings, path: Path, database: Database
) -> None:
    before = one.expect()
    for _ in range(2):
        with pytest.raises(AllocationFailed), one.loading():
            raise AllocationFailed("the context", 1, 0)
    after = new_estimate(host, path, database).best
    total = before.shares[0].total
    # Most of the earlier memory of this process is in the margin, which is 15 % of the inexact parts.
    assert before.margins[HOST] < after.margins[HOST]
    assert after.margins[HOST] == round(0.15 * total), (
        "10 % after the first failure, half as much again after the second"
    )

    family = measurements.Identity(header.read(path), replace(one._configuration, context=2048), (), "another build")
    with database.work() as work:
        assert measurements.find(work, family).margin_floor == pytest.approx(0.075)
    with closing(Measuring(host, database, header.read(path), OPTIONS, "cpu")) as second:
        second.expect()
        engine = LlamaEngine(path, OPTIONS)
        kept = second.keep(engine)
        engine.close()
    assert kept is not None
    assert kept.margins[HOST] == round(0.15 * kept.shares[0].total), (
        "the load succeeded, but memory may still run out later"
    )
    with database.work() as work:
        work.run(text("UPDATE footprint SET updated_at = now() - interval '25 hours'"))
        assert measurements.find(work, one._identity).margin_floor == 0, "old failures have no effect"
        measurements.record_failure(work, one._identity)
        assert measurements.find(work, one._identity).margin_floor == 0.1, "the count starts again"
    one.end()
    with database.work() as work:
        assert measurements.find(work, one._identity).margin_floor == 0, "a pool that served to its end resets it"
        assert measurements.find(work, family).margin_floor == 0


def test_a_smaller_measurement_does_not_replace_a_greater_one(one: Measuring, database: Database) -> None:
    great = one.expect()
    small = replace(great, shares=(replace(great.shares[0], process=1),))
    with database.work() as work:
        for footprint in (small, great, small):
            measurements.record_measured(work, one._identity, footprint)
        assert measurements.find(work, one._identity).measured == great
        assert work.row(text("SELECT loads FROM footprint WHERE key = :key"), {"key": one._identity.key})[0] == 3


def test_a_load_that_cannot_fit_is_refused_before_it_starts(host: Settings, path: Path, database: Database) -> None:
    huge = OPTIONS.model_copy(update={"context": 2**30})
    with (
        closing(Measuring(host, database, header.read(path), huge, "cpu")) as made,
        pytest.raises(MemoryNotEnough) as caught,
    ):
        made.expect()
    assert caught.value.needed is not None
    assert caught.value.free is not None
    assert caught.value.needed > caught.value.free
    assert "on cpu needs" in str(caught.value)


def test_the_memory_of_processes_is_stored_per_host_and_device(one: Measuring, database: Database) -> None:
    gpu = MeasuredDevice("gpu-0", HardwareKind.GPU, "NVIDIA H200", 140 * 2**30, 140 * 2**30, uuid="GPU-1", driver="570")
    with database.work() as work:
        assert measurements.process_memory(work, "a", "b", [gpu]) == closed_form.DEFAULT_PROCESS
        measurements.record_process_memory(work, "a", "b", "GPU-1", 450 * MIB)
        measurements.record_process_memory(work, "a", "b", "GPU-1", 400 * MIB)
        measurements.record_process_memory(work, "a", "b", "cpu", 120 * MIB)
        assert measurements.process_memory(work, "a", "b", [gpu]) == closed_form.ProcessMemory(120 * MIB, 450 * MIB)
        assert measurements.process_memory(work, "a", "other build", [gpu]) == closed_form.DEFAULT_PROCESS


def test_the_identity_contains_everything_that_changes_a_footprint(path: Path, tmp_path: Path) -> None:
    read = header.read(path)
    gpus = [
        MeasuredDevice(f"gpu-{n}", HardwareKind.GPU, "NVIDIA H200", 1, 1, uuid=f"GPU-{n}", driver="570") for n in (0, 1)
    ]
    copy = tmp_path / "renamed.gguf"
    copy.symlink_to(path)
    first = estimate.identify(read, LoadConfiguration(context=1024, sequences=2), gpus[:1])
    assert first.key == estimate.identify(header.read(copy), first.configuration, gpus[1:]).key, "any of equal GPUs"
    others: dict[str, Any] = {
        "context": 2048, "sequences": 3, "streams": True, "batch": 256, "ubatch": 256, "kv_type_k": "q8_0",
        "kv_type_v": "q8_0", "flash_attention": True, "swa_full": False, "gpu_layers": 1, "split_mode": "row",
        "tensor_split": (1.0,), "main_gpu": 1, "mmap": False, "embedding": 64, "pooling": "cls", "parked": 1,
        "image_tokens": 64, "drafts": 16, "draft_slots": 2,
    }  # fmt: skip
    assert others.keys() == {field.name for field in fields(LoadConfiguration)}, (
        "every field of a configuration is covered"
    )
    changed = [
        *(replace(first, configuration=replace(first.configuration, **{key: value})) for key, value in others.items()),
        estimate.identify(read, first.configuration, gpus),
        estimate.identify(read, first.configuration, [replace(gpus[0], driver="580")]),
        estimate.identify(read, first.configuration, [replace(gpus[0], model="NVIDIA L4")]),
        estimate.identify(read, first.configuration, gpus[:1], adapters=[read]),
        estimate.identify(read, first.configuration, gpus[:1], projector=read),
        estimate.identify(read, first.configuration, gpus[:1], draft=read),
        replace(first, header=replace(read, digest="of another header")),
        replace(first, build="another"),
        replace(first, processor="another"),
    ]
    assert len({one.key for one in (first, *changed)}) == 1 + len(changed)
    assert llama_build.build() == llama_build.build() != ""
    assert first.processor


def test_the_growth_of_a_pool_is_stored(one: Measuring, host: Settings, path: Path, database: Database) -> None:
    one.expect()
    engine = LlamaEngine(path, OPTIONS)
    kept = one.keep(engine)
    assert kept is not None
    assert one.grown() is None, "nothing has happened"
    held = b"x" * (160 * MIB)  # as an unknown library might allocate
    grown = one.grown()
    assert grown is not None
    assert 64 * MIB < grown.shares[0].total - kept.shares[0].total < len(held), "the counted bytes are used first"
    assert one.grown() is None, "it is known now"
    del held
    engine.close()
    assert new_estimate(host, path, database).best == grown


def test_the_embedding_context_is_created_before_a_pool_serves(host: Settings, path: Path, database: Database) -> None:
    options = OPTIONS.model_copy(update={"vectors": True, "embedding_context": 64})
    with closing(Measuring(host, database, header.read(path), options, "cpu")) as made:
        expected = made.expect()
        engine = LlamaEngine(path, options)
        kept = made.keep(engine)
        assert engine.metrics().embedded_texts == 1
        grown = made.grown()
        engine.close()
    assert kept is not None
    assert kept.shares[0].cache == expected.shares[0].cache
    assert grown is None, "it was counted before it was created"


@pytest.mark.parametrize("source", [FootprintSource.DRY_RUN, FootprintSource.CLOSED_FORM])
def test_the_memory_of_a_pool_on_a_gpu_is_the_figure_of_the_driver(
    source: FootprintSource, host: Settings, path: Path, monkeypatch: pytest.MonkeyPatch, database: Database
) -> None:
    """The figures of the driver and the dry run are simulated; the engine computes on the CPU."""
    used = [900 * MIB]

    def inventory(_: Devices) -> Inventory:
        processes = (DeviceProcess(os.getpid(), used[0]), DeviceProcess(1, MIB))
        size = 24 * 2**30
        return Inventory(
            (
                MeasuredDevice(
                    "gpu-0", HardwareKind.GPU, "L4", size, size - MIB, uuid="GPU-1", driver="570", processes=processes
                ),
            )
        )

    def dry(identity: measurements.Identity, *_: Any, **__: Any) -> Footprint:
        if source is FootprintSource.CLOSED_FORM:
            raise estimate.NoDryRun("not available")
        return replace(closed_form.closed_form(identity.header, identity.configuration, gpus=1), source=source)

    monkeypatch.setattr(llama_build, "backends", lambda: {GpuBackend.CUDA})
    monkeypatch.setattr(visible, "gpus", lambda: [VisibleGpu("CUDA0", "L4", 1, 1, "")])
    monkeypatch.setattr(Devices, "measure", inventory)
    monkeypatch.setattr(estimate, "dry_run", dry)
    with closing(Measuring(host, database, header.read(path), OPTIONS, "GPU-1")) as made:
        assert made.expect().source is source
        engine = LlamaEngine(path, OPTIONS)
        kept = made.keep(engine)
        engine.close()
        assert made.grown() is None
        used[0] += 20 * MIB
        grown = made.grown()
    assert kept is not None
    assert grown is not None
    card = kept.shares[1]
    assert (card.total, grown.shares[1].total) == (900 * MIB, 924 * MIB), "by steps of 8 MiB"
    with database.work() as work:
        found = measurements.process_memory(work, made._host, llama_build.build(), inventory(made._devices).devices)
    context = 900 * MIB - card.weights - card.cache - card.compute
    assert found.context == (context if source is FootprintSource.DRY_RUN else closed_form.DEFAULT_PROCESS.context), (
        "without the error of the formula"
    )


def test_a_build_without_cuda_refuses_gpus(
    host: Settings, path: Path, monkeypatch: pytest.MonkeyPatch, database: Database
) -> None:
    """Otherwise it would load the model into unreserved RAM."""
    monkeypatch.setattr(llama_build, "backends", set)
    with pytest.raises(Unavailable, match=r"built without CUDA.*CMAKE_ARGS=-DGGML_CUDA=ON .*pip install"):
        Measuring(host, database, header.read(path), OPTIONS, "GPU-1")


@pytest.mark.parametrize("gpus", [0, 2])
def test_the_pool_and_the_catalogue_agree_on_the_configuration(host: Settings, gpus: int) -> None:
    """The scheduler plans with the configuration that the pool loads."""
    given: list[dict[str, Any]] = [
        {},
        {"use_cases": ["embed"]},
        {"use_cases": ["rerank"], "engine.pooling": "rank"},
        {"slots": 16},
        {"slots": 32, "engine.kept": 4},
        {"slots": 32, "context": 512, "engine.reuse": False},
        {"engine.layout": "streams", "engine.batch": 64, "engine.swa_full": False, "kv.k": "q8_0"},
        {"engine.reproducible": True, "engine.gpu_layers": 3, "engine.tensor_split": [1.0, 2.0]},
        {"engine.kept": 3, "engine.park_bytes": 7, "engine.mmap": False, "engine.pooling": "cls", "slots": 3},
    ]
    for entry in (catalog.with_values(SMOLLM2, values, {}) for values in given):
        options = pool.options_of(entry, host, gpus=bool(gpus), threads=1)
        assert measurement.configuration_of(options, gpus=gpus) == of_model(entry, gpus=gpus)


@pytest.mark.parametrize("label", ["4 x 512", pytest.param("kv q8_0", marks=pytest.mark.storm)])
def test_a_process_grows_by_the_estimate(path: Path, label: str) -> None:
    """A child process loads the model with the real engine and computes a whole, small micro-batch."""
    configuration = replace(benchmark.REAL[label], ubatch=64)
    identity = estimate.identify(header.read(path), configuration, ())
    question = json.dumps({"path": str(path), "configuration": configuration.as_json()})
    command = [sys.executable, "-m", "benchmarks.footprint", "--child", question]
    environment = os.environ | {"PYTHONPATH": str(Path(benchmark.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    growth = json.loads(done.stdout.splitlines()[-1])["growth"]
    for footprint in (estimate.dry_run(identity), closed_form.closed_form(identity.header, configuration)):
        assert benchmark.of_model(footprint) == pytest.approx(growth, rel=0.06)
        assert benchmark.of_model(footprint) + footprint.margins[HOST] > growth, "never an underestimate"

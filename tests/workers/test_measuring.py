"""A pool says what its model will take, measures what it took, and learns from memory that ran out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from app.fleet import catalog, estimate, files, header, measurements, reckoning
from app.fleet.configuration import Configuration, of_model
from app.fleet.device import Device, DeviceKind
from app.fleet.footprint import HOST, MIB, Source
from app.kernel import settings
from app.kernel.database import Database
from app.kernel.errors import AllocationFailed, MemoryNotEnough
from app.kernel.settings import Settings
from benchmarks import footprint as benchmark
from workers import measuring, pool
from workers.engine.engine import LlamaEngine
from workers.engine.options import EngineOptions
from workers.measuring import Measuring

SMOLLM2 = files.read_catalog().get("smollm2:135m")
OPTIONS = EngineOptions(slots=2, context=1024, threads=1, park_bytes=0)


@pytest.fixture(scope="session")
def path() -> Path:
    return files.locate(SMOLLM2, Path())


@pytest.fixture
def host(database: Database, redis_url: str, tmp_path: Path) -> Settings:
    given = {"DATABASE_URL": database.raw_url(), "REDIS_URL": redis_url, "DATA_DIR": str(tmp_path)}
    return settings.load(environment={f"ARRIERO_{name}": value for name, value in given.items()}).settings


@pytest.fixture
def one(host: Settings, path: Path) -> Iterator[Measuring]:
    with closing(Measuring(host, header.read(path), OPTIONS, "cpu", embeds=False)) as made:
        yield made


def again(host: Settings, path: Path) -> estimate.Estimate:
    """What is known of the same load now."""
    with closing(Measuring(host, header.read(path), OPTIONS, "cpu", embeds=False)) as made:
        return estimate.estimate(made._identity, made._database, made._host, dry=False)


def test_what_was_measured_is_believed_the_next_time(one: Measuring, host: Settings, path: Path) -> None:
    expected = one.expect()
    assert expected.source is Source.DRY_RUN
    with one.loading():
        engine = LlamaEngine(path, OPTIONS)
    kept = one.keep(engine)
    resident = sum(measuring._memory() or ())
    engine.close()

    assert kept is not None
    found = again(host, path)
    assert [footprint.source for footprint in found.footprints] == [Source.MEASURED, Source.DRY_RUN, Source.CLOSED_FORM]
    assert found.best == kept
    for part in ("weights", "cache", "compute", "output"):
        assert getattr(kept.shares[0], part) == getattr(expected.shares[0], part)
    # What this process held before the load counts as its own; buffers count in full, though little of them was used.
    assert resident <= kept.shares[0].total <= resident + kept.shares[0].compute + 40 * MIB


def test_a_dry_run_is_made_once(one: Measuring, host: Settings, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one.expect()
    monkeypatch.setattr(estimate, "_PROBE", "no_such_module")
    with closing(Measuring(host, header.read(path), OPTIONS, "cpu", embeds=False)) as second:
        assert second.expect().source is Source.DRY_RUN


def test_memory_that_runs_out_makes_the_next_estimate_more_careful(
    one: Measuring, host: Settings, path: Path, database: Database
) -> None:
    before = one.expect()
    for _ in range(2):
        with pytest.raises(AllocationFailed), one.loading():
            raise AllocationFailed("the context", 1, 0)
    after = again(host, path).best
    total = before.shares[0].total
    assert before.margins[HOST] < 0.14 * total
    assert after.margins[HOST] == round(0.15 * total), "a tenth, and half as much again for the second time"

    family = measurements.Identity(header.read(path), replace(one._configuration, context=2048), (), "another build")
    with database.work() as work:
        assert measurements.find(work, family).floor == pytest.approx(0.075)
        measurements.keep_measured(work, one._identity, before)
        assert measurements.find(work, one._identity).floor == 0, "a load that went well takes it back"


def test_a_smaller_measurement_does_not_replace_a_greater_one(one: Measuring, database: Database) -> None:
    great = one.expect()
    small = replace(great, shares=(replace(great.shares[0], process=1),))
    with database.work() as work:
        for footprint in (small, great, small):
            measurements.keep_measured(work, one._identity, footprint)
        assert measurements.find(work, one._identity).measured == great
        assert work.row(text("SELECT loads FROM footprint WHERE key = :key"), {"key": one._identity.key})[0] == 3


def test_what_cannot_fit_is_refused_before_it_is_loaded(host: Settings, path: Path) -> None:
    huge = EngineOptions(slots=2, context=2**30, threads=1)
    with (
        closing(Measuring(host, header.read(path), huge, "cpu", embeds=False)) as made,
        pytest.raises(MemoryNotEnough) as caught,
    ):
        made.expect()
    assert caught.value.needed is not None
    assert caught.value.free is not None
    assert caught.value.needed > caught.value.free
    assert "on cpu needs" in str(caught.value)


def test_what_a_process_takes_is_kept_for_each_device_of_a_host(one: Measuring, database: Database) -> None:
    gpu = Device("gpu-0", DeviceKind.GPU, "NVIDIA H200", 140 * 2**30, 140 * 2**30, uuid="GPU-1", driver="570")
    with database.work() as work:
        assert measurements.process(work, "a", "b", [gpu]) == reckoning.GUESS
        measurements.keep_process(work, "a", "b", "GPU-1", 450 * MIB)
        measurements.keep_process(work, "a", "b", "GPU-1", 400 * MIB)
        measurements.keep_process(work, "a", "b", "cpu", 120 * MIB)
        assert measurements.process(work, "a", "b", [gpu]) == reckoning.Process(120 * MIB, 450 * MIB)
        assert measurements.process(work, "a", "other build", [gpu]) == reckoning.GUESS


def test_an_identity_is_all_that_decides(path: Path, tmp_path: Path) -> None:
    read = header.read(path)
    gpus = [Device(f"gpu-{n}", DeviceKind.GPU, "NVIDIA H200", 1, 1, uuid=f"GPU-{n}", driver="570") for n in (0, 1)]
    copy = tmp_path / "renamed.gguf"
    copy.symlink_to(path)
    first = estimate.identify(read, Configuration(context=1024, sequences=2), gpus[:1])
    assert first.key == estimate.identify(header.read(copy), first.configuration, gpus[1:]).key, "any of equal GPUs"
    others = [
        estimate.identify(read, replace(first.configuration, ubatch=256), gpus[:1]),
        estimate.identify(read, first.configuration, gpus),
        estimate.identify(read, first.configuration, [replace(gpus[0], driver="580")]),
        estimate.identify(read, first.configuration, gpus[:1], adapters=[read]),
        replace(first, build="another"),
    ]
    assert len({one.key for one in (first, *others)}) == 6
    assert measurements.build() == measurements.build() != ""


@pytest.mark.parametrize("device", ["cpu", "0"])
def test_the_pool_and_the_catalogue_agree_on_the_configuration(host: Settings, device: str) -> None:
    """What placement reckons with is what the pool loads."""
    given: list[dict[str, Any]] = [
        {},
        {"use_cases": ["embed"]},
        {"engine.layout": "streams", "engine.batch": 64, "engine.swa_full": False, "kv.k": "q8_0"},
        {"engine.reproducible": True, "engine.gpu_layers": 3, "engine.tensor_split": [1.0, 2.0]},
        {"engine.kept": 3, "engine.park_bytes": 7, "engine.mmap": False, "engine.pooling": "cls", "slots": 3},
    ]
    gpus = 0 if device == "cpu" else 1
    for entry in (catalog.changed(SMOLLM2, values, {}) for values in given):
        options = pool.options_of(entry, host, gpus=bool(gpus), threads=1)
        found = measuring.configuration_of(options, embeds=entry.embeds, gpus=gpus)
        assert found == of_model(entry, gpus=gpus)


@pytest.mark.parametrize("label", ["4 x 512", "kv q8_0"])
def test_a_process_grows_by_what_was_said(path: Path, label: str) -> None:
    """A child loads the model with the real engine and computes a whole micro-batch, here a small one."""
    configuration = replace(benchmark.REAL[label], ubatch=64)
    identity = estimate.identify(header.read(path), configuration, ())
    question = json.dumps({"path": str(path), "configuration": configuration.as_json()})
    command = [sys.executable, "-m", "benchmarks.footprint", "--child", question]
    environment = os.environ | {"PYTHONPATH": str(Path(benchmark.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    growth = json.loads(done.stdout.splitlines()[-1])["growth"]
    for footprint in (estimate.dry_run(identity), reckoning.closed_form(identity.header, configuration)):
        assert benchmark.of_model(footprint) == pytest.approx(growth, rel=0.06)
        assert benchmark.of_model(footprint) + footprint.margins[HOST] > growth, "never less than it takes"

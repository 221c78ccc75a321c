"""The dry run: its figures equal those of the closed form and of a real load, and a failing probe is harmless."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.catalog import header
from app.catalog.engine_options import KvLayout
from app.devices.device import HardwareKind, MeasuredDevice
from app.footprint import closed_form, estimate
from app.footprint.configuration import LoadConfiguration
from app.footprint.estimate import NoDryRun
from app.footprint.footprint import HOST, FootprintSource
from app.kernel.errors import ModelFileDamaged
from benchmarks import shapes
from workers.engine.bindings import llama, native, probe
from workers.engine.bindings.llama import Context, LlamaModel
from workers.engine.options import DraftFile, EngineOptions
from workers.engine.speculation.draft_model import draft_options
from workers.pool.measurement import configuration_of

PLAIN = LoadConfiguration(context=2048, sequences=4)
CONFIGURATIONS = {
    "plain": PLAIN,
    "streams": replace(PLAIN, context=5000, sequences=3, streams=True),
    "quantised": replace(PLAIN, kv_type_k="q8_0", kv_type_v="q4_0", ubatch=64),
    "no flash attention": replace(PLAIN, flash_attention=False),
    "windows": replace(PLAIN, context=8192, swa_full=False),
    "drafts": replace(PLAIN, drafts=16),
}


def dry_run(path: Path, configuration: LoadConfiguration) -> dict[str, Any]:
    """Return the probe's result, computed in this process."""
    return probe.dry_run({"path": str(path), "configuration": configuration.as_json(), "gpus": 0})


def summed(answer: dict[str, Any], part: str) -> int:
    return sum(buffer[part] for buffer in answer["contexts"][0]["buffers"])


@pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@pytest.mark.parametrize("model", ["model_path", "gemma_path", "tiny_llama", "tiny_mamba"])
def test_the_closed_form_equals_the_dry_run(
    model: str, configuration: LoadConfiguration, request: pytest.FixtureRequest
) -> None:
    """Weights and caches are equal to the byte, compute buffers within the margin."""
    path: Path = request.getfixturevalue(model)
    answer = dry_run(path, configuration)
    closed = closed_form.closed_form(header.read(path), configuration)
    host = closed.shares[0]
    assert (host.weights, host.cache) == (summed(answer, "model"), summed(answer, "context"))
    assert summed(answer, "compute") <= host.compute + closed.margins[HOST]
    assert abs(answer["contexts"][0]["output"] - host.output) <= 2**14


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_mamba"])
@pytest.mark.parametrize("layout", [None, *KvLayout])
@pytest.mark.parametrize("slots", [1, 8, 16, 32])
def test_the_probe_uses_the_parameters_of_the_engine(
    slots: int, layout: KvLayout | None, model: str, request: pytest.FixtureRequest
) -> None:
    """Includes chosen layouts, context sizes that llama.cpp pads, and the embedding context."""
    path: Path = request.getfixturevalue(model)
    options = EngineOptions(slots=slots, context=1100 * slots, layout=layout, threads=1)
    configuration = configuration_of(options, gpus=0)
    engines, probes = (llama.context_params(one) for one in (options, probe.options_of(configuration)))
    numbers = [name for name, _ in engines._fields_ if isinstance(getattr(engines, name), int | float)]
    assert len(numbers) > 20
    assert [getattr(engines, name) for name in numbers] == [getattr(probes, name) for name in numbers]
    host, contexts = closed_form.closed_form(header.read(path), configuration).shares[0], dry_run(path, configuration)
    assert host.cache == sum(buffer["context"] for context in contexts["contexts"] for buffer in context["buffers"])
    assert configuration.streams is options.streams is (layout is KvLayout.STREAMS or (not layout and slots >= 8))


@pytest.mark.parametrize(
    "shape", ["llama-3.1-70b", "gemma-3-4b", "gpt-oss-20b", "deepseek-v2-lite", "qwen3-30b-a3b", "lfm2-1.2b"]
)
def test_large_models_are_computed_without_their_weights(tmp_path: Path, shape: str) -> None:
    """Grouped heads, windows, compressed caches, experts, states: figures from a header and a sparse file."""
    path = shapes.write(shape, tmp_path)
    configuration = replace(PLAIN, context=8192, sequences=2, swa_full=False)
    answer, host = dry_run(path, configuration), closed_form.closed_form(header.read(path), configuration).shares[0]
    assert (host.weights, host.cache) == (summed(answer, "model"), summed(answer, "context"))
    assert host.compute == pytest.approx(summed(answer, "compute"), rel=0.15)


@pytest.mark.parametrize("configuration", [CONFIGURATIONS["streams"], CONFIGURATIONS["quantised"]])
def test_the_dry_run_equals_the_load(model_path: Path, configuration: LoadConfiguration) -> None:
    options = probe.options_of(replace(configuration, mmap=False))
    model = LlamaModel(model_path, options)
    context = Context(model, options)
    loaded = list(probe._buffers(context.pointer))
    context.close()
    model.close()
    assert dry_run(model_path, configuration)["contexts"][0]["buffers"] == loaded


def test_a_child_process_returns_the_same(model_path: Path) -> None:
    read = header.read(model_path)
    dry = estimate.dry_run(estimate.identify(read, replace(PLAIN, embedding=256), ()))
    closed = closed_form.closed_form(read, replace(PLAIN, embedding=256))
    assert dry.source is FootprintSource.DRY_RUN
    assert (dry.shares[0].weights, dry.shares[0].cache) == (closed.shares[0].weights, closed.shares[0].cache)
    assert dry.shares[0].compute == pytest.approx(closed.shares[0].compute, rel=0.02)
    assert dry.margins[HOST] <= closed.margins[HOST]


def test_the_memory_of_a_draft_model_is_that_of_its_load(model_path: Path, gemma_path: Path) -> None:
    """The estimates count the weights, the cache and the buffers of both models."""
    options = EngineOptions(
        slots=3,
        context=3000,
        threads=1,
        vectors=False,
        mmap=False,
        speculation="auto",
        draft=DraftFile(path=model_path),
    )
    configuration = configuration_of(options, gpus=0)
    own = draft_options(options)
    assert own.streams
    loaded: list[Any] = []
    for path, of_model in ((gemma_path, options), (model_path, own)):
        model = LlamaModel(path, of_model)
        context = Context(model, of_model)
        loaded += probe._buffers(context.pointer)
        context.close()
        model.close()
    identity = estimate.identify(header.read(gemma_path), configuration, (), draft=header.read(model_path))
    dry = estimate.dry_run(identity).shares[0]
    closed = estimate.estimate(identity, None, "here", allow_dry_run=False).best.shares[0]
    sums = [sum(buffer[part] for buffer in loaded) for part in ("model", "context", "compute")]
    assert [dry.weights, dry.cache, dry.compute] == sums
    assert [closed.weights, closed.cache] == sums[:2]
    assert closed.compute == pytest.approx(sums[2], rel=0.15)
    assert closed.output >= 4 * ((6 + 16) * 262_144 + 3 * 49_152)
    without = estimate.identify(header.read(gemma_path), replace(configuration, draft_slots=0), ())
    assert identity.key != without.key


def test_a_file_that_cannot_be_loaded_has_no_dry_run(tmp_path: Path, model_path: Path) -> None:
    odd = tmp_path / "odd.gguf"
    name = b"\x05\0\0\0\0\0\0\0llama"
    odd.write_bytes(model_path.read_bytes().replace(name, name.replace(b"llama", b"lxama"), 1))
    with pytest.raises(NoDryRun, match="unknown model architecture"):
        estimate.dry_run(estimate.identify(header.read(odd), PLAIN, ()))


@pytest.mark.parametrize(
    ("crash", "message"),
    [
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        ("raise SystemExit('no such symbol')", "ended with code 1: no such symbol"),
        ("print('hello')", "instead of an answer"),
        ("import time; time.sleep(30)", "did not end within"),
    ],
)
def test_a_crashing_probe_only_loses_its_result(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: str, message: str
) -> None:
    (tmp_path / "broken_probe.py").write_text(crash)
    monkeypatch.setattr(estimate, "_PROBE", "broken_probe")
    monkeypatch.setattr(estimate, "_TIMEOUT", estimate._TIMEOUT / (600 if "sleep" in crash else 1))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = estimate.estimate(estimate.identify(header.read(model_path), PLAIN, ()), None, "here")
    assert message in found.missing[FootprintSource.DRY_RUN]
    assert found.best.source is FootprintSource.CLOSED_FORM


def broken(buffers: list[dict[str, Any]], part: str, factor: float) -> Callable[[Any], Any]:
    return lambda _: [buffer | {part: int(buffer[part] * factor)} for buffer in buffers]


@pytest.mark.parametrize(
    ("part", "factor", "message"),
    [("model", 3, "of weights"), ("context", 0.5, "of caches"), ("compute", 1.1, "of compute buffers")],
)
def test_unconfirmed_figures_are_rejected(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, part: str, factor: float, message: str
) -> None:
    buffers = dry_run(tiny_llama, PLAIN)["contexts"][0]["buffers"]
    monkeypatch.setattr(probe, "_buffers", broken(buffers, part, factor))
    with pytest.raises(probe.DryRunFailed, match=message):
        dry_run(tiny_llama, PLAIN)


def test_a_map_with_another_layout_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with libc++, which stores the count elsewhere."""
    monkeypatch.setattr(native, "bound", lambda *_: lambda _: probe._Map(1, 2, 0, 0, 0, 2**40))
    with pytest.raises(probe.DryRunFailed, match="layout is not the expected one"):
        list(probe._buffers(None))


def test_a_build_without_the_symbol_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_SYMBOL", "llama_no_such_function")
    with pytest.raises(probe.DryRunFailed, match="does not export"):
        list(probe._buffers(None))


def test_gpus_that_llama_cpp_does_not_see_are_rejected(tiny_llama: Path) -> None:
    gpu = MeasuredDevice("gpu-0", HardwareKind.GPU, "NVIDIA L4", 1, 1, uuid="GPU-0")
    with pytest.raises(NoDryRun, match="sees 0 GPUs; the request names 1"):
        estimate.dry_run(estimate.identify(header.read(tiny_llama), replace(PLAIN, gpu_layers=-1), [gpu]))


def test_states_are_not_allocated_to_be_counted(tmp_path: Path) -> None:
    read = header.read(shapes.write("mamba2-2.7b", tmp_path))
    with pytest.raises(NoDryRun, match="states"):
        estimate.dry_run(estimate.identify(read, replace(PLAIN, sequences=8), ()))


def test_a_context_that_would_fill_this_host_has_no_dry_run(tiny_llama: Path) -> None:
    """llama.cpp keeps bookkeeping per cell, in a dry run too: for a billion cells it is 52 GB."""
    with pytest.raises(NoDryRun, match="records of cells"):
        estimate.dry_run(estimate.identify(header.read(tiny_llama), replace(PLAIN, context=2**30), ()))


def test_the_log_callback_is_restored_after_a_probe(tiny_llama: Path, tmp_path: Path) -> None:
    dry_run(tiny_llama, PLAIN)
    (tmp_path / "no.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
    with native.captured_log() as lines, pytest.raises(ModelFileDamaged):
        LlamaModel(tmp_path / "no.gguf", probe.options_of(PLAIN))
    assert lines()

"""
The engine on devices: the same texts and vectors as on the CPU, on one device, on a split, and after parking.

One engine at a time in a process of the test, as in a pool: see `conftest.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from app.devices.vulkan.listing import VulkanListing
from app.inference.requests import EmbedRequest, GenerateRequest, PriorityClass, Sampling
from tests.gpu.engine.conftest import RunProgram
from workers.engine.bindings import native
from workers.engine.engine import LlamaEngine
from workers.engine.options import Lora

MakeEngine = Callable[..., LlamaEngine]

#: Nothing is left to chance, and nothing ends early.
GREEDY = Sampling(temperature=0, ignore_end=True)
#: Seconds for an answer: each kernel is compiled for the processor when it is used first.
PATIENCE = 300
#: What is tried of the types of the cache: those that the catalogue offers, in one type for keys and values.
KV_TYPES = ["f32", "f16", "bf16", "q8_0", "q4_0"]


def written(engine: LlamaEngine, prompt: str = "A long walk", tokens: int = 6) -> str:
    return engine.generate(GenerateRequest(prompt=prompt, max_tokens=tokens, sampling=GREEDY)).result(PATIENCE).text


def once(make: MakeEngine, path: Path, prompt: str = "A long walk", tokens: int = 6, **options: object) -> str:
    """What an engine writes that is closed before another is made."""
    engine = make(path, **{"slots": 1, "vectors": False} | options)
    text = written(engine, prompt, tokens)
    engine.close()
    return text


def vectors(make: MakeEngine, path: Path, request: EmbedRequest, **options: object) -> np.ndarray:
    engine = make(path, slots=2, **options)
    found = np.array(engine.embed(request, timeout=PATIENCE).vectors)
    engine.close()
    return found


def test_a_process_sees_the_devices_that_its_variable_names(program: RunProgram) -> None:
    text = "from workers.engine.bindings import native; native.start(); print(len(native.gpus()))"
    assert [program(text, devices).out.strip() for devices in ("", "0", "0,0,0")] == ["0", "1", "3"]


def test_what_needs_no_device_sees_none(program: RunProgram, tiny_llama: Path) -> None:
    """Each visible device would get a context, even with no layer on it."""
    text = f"""
from pathlib import Path
from workers.engine.bindings import native, vocabulary
vocabulary.Vocabulary(Path({str(tiny_llama)!r}))
print(len(native.gpus()))
"""
    done = program(text)
    assert (done.code, done.out.strip()) == (0, "0"), done.err


def test_a_model_answers_on_devices_as_on_the_cpu(make: MakeEngine, model_path: Path, devices: int) -> None:
    question = "The capital of France is"
    on_cpu = once(make, model_path, question, 4, context=512, gpu_layers=0)
    split = once(make, model_path, question, 4, context=512, gpu_layers=-1, tensor_split=(1.0,) * devices)
    assert split == on_cpu
    assert "Paris" in on_cpu


def test_each_way_to_place_the_layers_writes_the_same(make: MakeEngine, tiny_llama: Path, devices: int) -> None:
    """One device, the last device, an uneven split, some layers in RAM, and all of them."""
    ways: list[dict[str, object]] = [
        {"split_mode": "none"},
        {"split_mode": "none", "main_gpu": devices - 1},
        {"tensor_split": (3.0, *(1.0,) * (devices - 1))},
        {"gpu_layers": 1},
        {"gpu_layers": 0},
    ]
    assert len({once(make, tiny_llama, **{"gpu_layers": -1} | way) for way in ways}) == 1


@pytest.mark.parametrize("kind", KV_TYPES)
def test_each_type_of_the_cache_serves(make: MakeEngine, tiny_llama: Path, kind: str) -> None:
    assert once(make, tiny_llama, gpu_layers=-1, kv_type_k=kind, kv_type_v=kind)


def test_it_serves_without_flash_attention_and_with_streams(make: MakeEngine, tiny_llama: Path) -> None:
    plain = once(make, tiny_llama, gpu_layers=-1)
    options = {"flash_attention": False, "layout": "streams", "vectors": False}
    engine = make(tiny_llama, slots=4, context=2048, gpu_layers=-1, **options)
    request = GenerateRequest(prompt="A long walk", max_tokens=6, sampling=GREEDY)
    tickets = [engine.generate(request) for _ in range(4)]
    assert {ticket.result(PATIENCE).text for ticket in tickets} == {plain}


def test_vectors_equal_those_of_the_cpu(make: MakeEngine, tiny_bert: Callable[..., Path]) -> None:
    path, request = tiny_bert(gguf.PoolingType.MEAN), EmbedRequest(("one road", "a mountain far away"))
    on_cpu, on_devices = (vectors(make, path, request, gpu_layers=layers) for layers in (0, -1))
    assert on_devices == pytest.approx(on_cpu, abs=2e-3)


def test_a_decoder_embeds_in_its_second_context(make: MakeEngine, tiny_llama: Path) -> None:
    request, options = EmbedRequest(("one road",)), {"embedding_context": 64}
    on_cpu, on_devices = (vectors(make, tiny_llama, request, gpu_layers=layers, **options) for layers in (0, -1))
    assert on_devices == pytest.approx(on_cpu, abs=5e-3)


def test_an_adapter_is_applied_on_devices(make: MakeEngine, tiny_llama: Path, tiny_lora: Path) -> None:
    loras = (Lora(name="style", path=tiny_lora),)
    base = once(make, tiny_llama, gpu_layers=-1)
    on_cpu = once(make, tiny_llama, gpu_layers=0, loras=loras)
    assert once(make, tiny_llama, gpu_layers=-1, loras=loras) == on_cpu != base


def test_an_adapter_is_switched_while_serving(make: MakeEngine, tiny_llama: Path, tiny_lora: Path) -> None:
    listing = VulkanListing()
    try:
        if any("Mesa 22." in one.driver for one in listing.read(())[0]):
            pytest.skip("Mesa 22.3 writes to freed memory after a graph was replaced; Mesa 25.0 does not")
    finally:
        listing.close()
    base = once(make, tiny_llama, gpu_layers=-1)
    engine = make(tiny_llama, slots=1, gpu_layers=-1, loras=(Lora(name="style", path=tiny_lora),), vectors=False)
    adapted = written(engine)
    for scales, expected in [({}, base), ({"style": 1.0}, adapted), ({}, base)]:
        engine.use_loras(scales, timeout=PATIENCE)
        assert written(engine) == expected


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_a_cache_on_devices_is_parked_in_ram_and_resumed(make: MakeEngine, tiny_llama: Path, kind: str) -> None:
    """An interactive request takes the only slot of one of the class batch, whose text continues byte for byte."""
    options = {"slots": 1, "context": 2048, "gpu_layers": -1, "kv_type_k": kind, "kv_type_v": kind, "vectors": False}
    prompt = "Long ago, before there were any roads in the mountains,"
    alone = once(make, tiny_llama, prompt, 60, **options)
    engine = make(tiny_llama, reuse=False, **options)
    shown: list[str] = []
    started = threading.Event()

    def reader(text: str) -> None:
        shown.append(text)
        if len(shown) == 5:
            started.set()

    parked = engine.generate(
        GenerateRequest(prompt=prompt, max_tokens=60, sampling=GREEDY, priority=PriorityClass.BATCH), reader
    )
    assert started.wait(PATIENCE)
    urgent = GenerateRequest(prompt="A walk", max_tokens=3, sampling=GREEDY, priority=PriorityClass.INTERACTIVE)
    assert engine.generate(urgent).result(PATIENCE).text
    assert engine.metrics().parked == 1
    assert parked.result(PATIENCE).text == alone == "".join(shown)
    assert engine.metrics().resumed == 1


def test_devices_have_names_and_memory(devices: int) -> None:
    assert devices >= 2
    free = [native.free_on(f"Vulkan{number}") for number in range(devices)]
    assert all(size for size in free)
    assert native.free_on("CPU") is None
    assert native.free_on("Vulkan99") is None

"""LoRA adapters change texts and vectors, and can be swapped between requests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from app.inference.requests import EmbedRequest, GenerateRequest, Sampling
from app.kernel.errors import NotFound
from workers.engine.engine import LlamaEngine
from workers.engine.options import Lora

MakeEngine = Callable[..., LlamaEngine]

REQUEST = GenerateRequest(prompt="A long walk " * 12, max_tokens=12, sampling=Sampling(temperature=0, ignore_end=True))


def written(engine: LlamaEngine) -> str:
    return engine.generate(REQUEST).result(60).text


def test_adapters_are_swapped_between_requests(make: MakeEngine, tiny_llama: Path, tiny_lora: Path) -> None:
    base = written(make(tiny_llama, slots=2))
    engine = make(tiny_llama, slots=2, loras=(Lora(name="style", path=tiny_lora),))
    styled = written(engine)
    assert styled != base
    engine.use_loras({}, timeout=30)
    assert written(engine) == base
    started = threading.Event()
    running = engine.generate(REQUEST, lambda _: started.set())
    assert started.wait(60)
    engine.use_loras({"style": 1.0}, timeout=30)
    assert running.result(60).text == base
    assert written(engine) == styled
    with pytest.raises(NotFound):
        engine.use_loras({"other": 1.0})


def test_adapters_change_vectors_too(make: MakeEngine, tiny_llama: Path, tiny_lora: Path) -> None:
    request = EmbedRequest(("A long walk",))
    base = make(tiny_llama, slots=1).embed(request, timeout=30).vectors
    engine = make(tiny_llama, slots=1, loras=(Lora(name="style", path=tiny_lora),))
    styled = engine.embed(request, timeout=30).vectors
    engine.use_loras({}, timeout=30)
    assert engine.embed(request, timeout=30).vectors == base != styled
    engine.use_loras({"style": 1.0}, timeout=30)
    assert engine.embed(request, timeout=30).vectors == styled


def test_an_adapter_with_scale_zero_changes_nothing(make: MakeEngine, tiny_llama: Path, tiny_lora: Path) -> None:
    plain = make(tiny_llama, slots=1)
    later = make(tiny_llama, slots=1, loras=(Lora(name="style", path=tiny_lora, scale=0.0),))
    assert written(later) == written(plain)


def test_a_swap_happens_even_after_its_caller_timed_out(make: MakeEngine, tiny_llama: Path, tiny_lora: Path) -> None:
    engine = make(tiny_llama, slots=2, loras=(Lora(name="style", path=tiny_lora),))
    styled = written(engine)
    started = threading.Event()
    running = engine.generate(replace(REQUEST, max_tokens=200), lambda _: started.set())
    assert started.wait(60)
    with pytest.raises(TimeoutError):
        engine.use_loras({}, timeout=0)
    assert running.result(60).tokens_out == 200
    assert written(engine) != styled

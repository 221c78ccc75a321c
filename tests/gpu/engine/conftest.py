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


#: Set in the process of a test that has one of its own. The suite removes variables of the form ARRIERO_*.
_OWN = "GPU_TEST_OWN_PROCESS"
#: Runs a Python program that sees these devices.
RunProgram = Callable[..., Ended]


@pytest.fixture(scope="session")
def devices() -> int:
    """The number of devices that these tests have."""
    native.start()
    return len(native.gpus())


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """
    Run a test that makes engines in a process of its own, as a pool is one.

    With many contexts in one process, Mesa's software driver (22.3) corrupts its memory.
    """
    if "make" not in pyfuncitem.fixturenames or os.environ.get(_OWN):
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, _OWN: "1"}, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"exit code {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-2000:]}", pytrace=False)
    if "1 skipped" in done.stdout:
        pytest.skip(done.stdout[-500:])
    assert "1 passed" in done.stdout, done.stdout[-500:]
    return True


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

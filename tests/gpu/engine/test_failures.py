"""Devices without memory: an allocation that fails is reported as such, and a process that aborts is understood."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.gpu.engine.conftest import RunProgram
from workers.agent import inventory

#: Loads a model after the address space of the process was limited, so that a device's allocation fails and no check
#: before it. A software device's memory is that of the process.
LOAD = """
import resource, sys
from pathlib import Path
import psutil
from app.inference.requests import GenerateRequest
from app.kernel.errors import AllocationFailed
from workers.engine.bindings import native
from workers.engine.engine import LlamaEngine
from workers.engine.options import EngineOptions

def limit(mib):
    most = psutil.Process().memory_info().vms + mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))

def load(**options):
    given = {"slots": 1, "threads": 1, "gpu_layers": -1, "vectors": False} | options
    return LlamaEngine(Path(PATH), EngineOptions(**given))

native.start()
native.gpus()
"""


@pytest.mark.parametrize(
    ("options", "mib", "least"),
    [("context=2**17", 1500, 2**29), ("batch=2048, ubatch=2048, context=4096", 800, 2**25)],
    ids=["the cache", "a compute buffer"],
)
def test_an_allocation_that_fails_names_the_device_and_the_bytes(
    program: RunProgram, model_path: Path, options: str, mib: int, least: int
) -> None:
    done = program(
        f"PATH = {str(model_path)!r}\n{LOAD}\nlimit({mib})\n"
        f"try:\n    load({options})\n"
        "except AllocationFailed as error:\n    print(error.needed, error)\nelse:\n    print('0 it was loaded')\n"
        "sys.stdout.flush()\nimport os; os._exit(0)"
    )
    assert done.code == 0, done.err
    needed, _, message = done.out.splitlines()[-1].partition(" ")
    assert int(needed) > least, message
    assert "on Vulkan" in message
    assert "one buffer needs" in message


def test_an_engine_loads_again_after_a_failed_allocation(program: RunProgram, model_path: Path) -> None:
    done = program(
        f"PATH = {str(model_path)!r}\n{LOAD}\nlimit(1500)\n"
        "try:\n    load(context=2**17)\n"
        "except AllocationFailed:\n    pass\n"
        "engine = load(context=512)\n"
        "print('text', bool(engine.generate(GenerateRequest(prompt='a', max_tokens=2)).result(300).text))\n"
        "engine.close()"
    )
    assert "text True" in done.out.splitlines(), done.err


def test_a_process_without_memory_in_the_middle_of_a_decode_ends(program: RunProgram, tiny_llama: Path) -> None:
    """
    The driver allocates for kernels when they are used first. ggml has no handler for that: it aborts. What malloc has
    in stock is used up before.

    The agent sees why. Where the driver itself fails at once, it is a crash like any other.
    """
    done = program(
        f"PATH = {str(tiny_llama)!r}\n{LOAD}\nengine = load(context=512)\nlimit(2)\n"
        "held = []\ntry:\n    while True:\n        held.append(bytearray(4096))\n"
        "except MemoryError:\n    del held[-128:]\n"
        "engine.generate(GenerateRequest(prompt='a long walk ' * 60, max_tokens=2)).result(300)",
        MALLOC_ARENA_MAX="1",
    )
    assert done.code in {-signal.SIGABRT, -signal.SIGSEGV}, (done.code, done.err[-300:])
    assert inventory.is_out_of_memory(done.code, done.err, 0) is (done.code == -signal.SIGABRT), done.err[-300:]

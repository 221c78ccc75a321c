"""Loading: failures contain the reason, and the process survives them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import psutil
import pytest
from pydantic import ValidationError

from app.catalog.engine_options import KvType
from app.inference.requests import GenerateRequest, Sampling
from app.kernel.errors import (
    MemoryNotEnough,
    ModelFileDamaged,
    ModelFileMissing,
    ModelFileUnusable,
    ModelUnsupported,
)
from workers.engine.engine import LlamaEngine
from workers.engine.options import KV_BYTES, KV_TYPES, EngineOptions, KvLayout, Lora

ROOT = Path(__file__).parents[3]
MakeEngine = Callable[..., LlamaEngine]


def test_a_missing_file(make: MakeEngine, tmp_path: Path) -> None:
    with pytest.raises(ModelFileMissing, match=r"nothing\.gguf"):
        make(tmp_path / "nothing.gguf")
    with pytest.raises(ModelFileUnusable, match="directory"):
        make(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"GGUF" + b"\xff" * 900, b"GGUF\x03\0\0\0" + b"\0" * 5])
def test_a_file_that_is_not_a_model(make: MakeEngine, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "no.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileDamaged) as caught:
        make(path)
    assert caught.value.reason


@pytest.mark.parametrize("size", [5_000, 2_000_000, 60_000_000])
def test_a_truncated_file(make: MakeEngine, model_path: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "half.gguf"
    with model_path.open("rb") as file:
        path.write_bytes(file.read(size))
    with pytest.raises(ModelFileDamaged) as caught:
        make(path)
    assert "llama.cpp rejected it" not in caught.value.reason


def test_an_unknown_architecture(make: MakeEngine, model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    name = b"\x05\0\0\0\0\0\0\0llama"
    path.write_bytes(model_path.read_bytes().replace(name, name.replace(b"llama", b"lxama"), 1))
    with pytest.raises(ModelUnsupported, match="unknown model architecture: 'lxama'"):
        make(path)


def test_too_little_memory_is_reported_with_figures(make: MakeEngine) -> None:
    with pytest.raises(MemoryNotEnough) as caught:
        make(context=2**30)
    assert caught.value.needed is not None
    assert caught.value.free is not None
    assert caught.value.needed > caught.value.free


@pytest.mark.parametrize("options", [{"mmap": False}, {"mlock": True}])
def test_weights_that_cannot_be_paged_out_and_do_not_fit(
    make: MakeEngine, tiny_llama: Path, tmp_path: Path, options: dict[str, bool]
) -> None:
    path = tmp_path / "huge.gguf"
    shutil.copyfile(tiny_llama, path)
    os.truncate(path, 2**40)  # a sparse file: nothing is written
    with pytest.raises(MemoryNotEnough, match=r"huge\.gguf kept in memory needs 1,048,576 MiB; [\d,]+ MiB are free"):
        make(path, **options)


def test_a_failed_allocation_of_llama_cpp_is_reported_with_figures(tiny_llama: Path) -> None:
    """The address space is limited, so that llama.cpp's allocation fails and not the check before it."""
    program = f"""
import resource, sys
from pathlib import Path
import psutil
from app.kernel.errors import MemoryNotEnough
from workers.engine.engine import LlamaEngine
from workers.engine.options import EngineOptions
limit = psutil.Process().memory_info().vms + 200 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    LlamaEngine(Path({str(tiny_llama)!r}), EngineOptions(slots=1, threads=1, context=2**21))
except MemoryNotEnough as error:
    assert error.needed is not None and error.free is not None, error
    sys.exit(0 if error.needed > 2**28 and "MiB are free" in str(error) else str(error))
sys.exit("it was loaded")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_an_invalid_adapter(make: MakeEngine, model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileMissing):
        make(loras=(Lora(name="style", path=tmp_path / "no.gguf"),))
    with pytest.raises(ModelUnsupported):
        make(loras=(Lora(name="style", path=model_path),))


def test_an_engine_that_fails_to_load_frees_its_memory(make: MakeEngine, tiny_llama: Path, tmp_path: Path) -> None:
    """The adapter is loaded after the context, which has 64 MiB here, was created."""

    def resident() -> int:
        with pytest.raises(ModelFileMissing):
            make(tiny_llama, slots=1, context=2**18, loras=(Lora(name="style", path=tmp_path / "no.gguf"),))
        return int(psutil.Process().memory_info().rss)

    first = resident()
    assert max(resident() for _ in range(4)) - first < 64 * 2**20


def test_progress_is_reported(model_path: Path) -> None:
    seen: list[float] = []
    LlamaEngine(model_path, EngineOptions(threads=1), on_progress=seen.append).close()
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_options_that_would_abort_the_process_are_rejected() -> None:
    for wrong in (
        {"slots": 0},
        {"slots": 300},
        {"batch": 8},
        {"ubatch": 0},
        {"kv_type_k": "q9"},
        {"kv_type_v": "q8_0", "flash_attention": False},
        {"kv_type_v": "q8_0", "reproducible": True},
        {"context": 0},
    ):
        with pytest.raises(ValidationError):
            EngineOptions(**wrong)  # type: ignore[arg-type] # fields of several types


def test_every_kv_type_of_the_catalogue_has_a_number() -> None:
    assert set(KV_TYPES) == set(KV_BYTES) == set(get_args(KvType))


@pytest.mark.parametrize(
    ("options", "streams"),
    [
        ({"slots": 4, "context": 2**16}, False),
        ({"slots": 8, "context": 2**13}, True),
        ({"slots": 16, "context": 2**14}, True),
        ({"slots": 32, "context": 8192}, False),
        ({"slots": 32, "context": 2**16, "kept": 4}, False),
        ({"slots": 32, "context": 2**16, "layout": KvLayout.UNIFIED}, False),
        ({"slots": 2, "layout": KvLayout.STREAMS}, True),
        ({"slots": 2, "layout": KvLayout.UNIFIED, "reproducible": True}, True),
    ],
)
def test_many_slots_use_streams_when_each_is_large_enough(options: dict[str, object], streams: bool) -> None:
    assert EngineOptions(**options).streams == streams  # type: ignore[arg-type] # fields of several types


@pytest.mark.parametrize(
    "options",
    [
        {"kv_type_k": "q8_0", "kv_type_v": "q8_0"},
        {"flash_attention": False, "layout": KvLayout.STREAMS},
        {"mmap": False, "ubatch": 16, "batch": 32},
        {"slots": 128, "context": 4096, "batch": 128},
        {"context": 1000, "slots": 3},
        {"context": 64, "slots": 4, "layout": KvLayout.STREAMS},
    ],
)
def test_unusual_options_serve(make: MakeEngine, tiny_llama: Path, options: dict[str, object]) -> None:
    engine = make(tiny_llama, **options)
    requests = [GenerateRequest(prompt=f"{n} " * 60, max_tokens=3, sampling=Sampling(temperature=0)) for n in range(5)]
    tickets = [engine.generate(request) for request in requests]
    assert all(ticket.result(60).tokens_out for ticket in tickets)

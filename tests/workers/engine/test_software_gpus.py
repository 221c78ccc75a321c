"""A short form of tests/gpu, where the wheel of `make test-gpu` is in its cache: two software devices, in a process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

#: The dry run equals a load on a split over two devices, and a text is written there.
PROGRAM = """
import sys
from pathlib import Path
from app.footprint.configuration import LoadConfiguration
from app.inference.requests import GenerateRequest, Sampling
from workers.engine.bindings import llama, native, probe
from workers.engine.engine import LlamaEngine
from workers.engine.options import EngineOptions

path = Path(sys.argv[1])
made = LoadConfiguration(context=512, sequences=2, ubatch=64, gpu_layers=-1, mmap=False)
request = {"path": str(path), "configuration": made.as_json(), "gpus": 2}
dry = {one["name"]: one for one in probe.dry_run(request)["contexts"][0]["buffers"]}
model = llama.LlamaModel(path, probe.options_of(made))
context = llama.Context(model, model.options)
real = {one["name"]: one for one in probe._buffers(context.pointer)}
context.close()
model.close()
for name in ("Vulkan0", "Vulkan1"):
    for part in ("gpu", "model", "context"):
        assert dry[name][part] == real[name][part], (name, part, dry, real)
    assert dry[name]["model"] and 0 < real[name]["compute"] <= dry[name]["compute"], (dry, real)
engine = LlamaEngine(path, EngineOptions(slots=1, context=256, gpu_layers=-1, threads=1, vectors=False))
ask = GenerateRequest(prompt="A", max_tokens=2, sampling=Sampling(temperature=0, ignore_end=True))
assert engine.generate(ask).result(300).tokens_out == 2
engine.close()
print("equal")
"""


@pytest.mark.slow
def test_two_software_devices_have_what_the_dry_run_says(tiny_llama: Path, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("vulkan", ROOT / "deploy/vulkan.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    wheel = script.find_wheel(metadata.version(script.PACKAGE))
    if wheel is None:
        pytest.skip(f"no llama.cpp for Vulkan in {script.cache()}: `make test-gpu` builds it")
    if not list(Path("/usr/share/vulkan/icd.d").glob("*.json")):
        pytest.skip("there is no Vulkan driver; on Debian: apt-get install mesa-vulkan-drivers")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path)
    variables = {"PYTHONPATH": str(tmp_path), "GGML_VK_VISIBLE_DEVICES": "0,0"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tiny_llama)],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "equal"

"""
Footprints on GPUs: what the dry run and the closed form say of each device, against the buffers of a real load.

    GGML_VK_VISIBLE_DEVICES=0,0 .venv-gpu/bin/python -m benchmarks.gpu_footprints >> FILE

It uses every GPU that llama.cpp sees, and writes a section of Markdown with the machine, the versions and the command.
Buffers are compared, not times.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from app.catalog import files, header
from app.devices import llama_build
from app.footprint import closed_form
from app.footprint.configuration import LoadConfiguration
from app.footprint.footprint import HOST, MIB
from workers.engine.bindings import llama, native, probe

MODELS = ("smollm2:135m", "gemma3:270m")


def configurations(devices: int) -> dict[str, LoadConfiguration]:
    """What is compared, for a number of devices."""
    all_ = LoadConfiguration(context=2048, sequences=4, gpu_layers=-1, mmap=False)
    one = replace(all_, split_mode="none")
    made = {
        "one device": one,
        "ubatch 64": replace(one, ubatch=64),
        "ubatch 2048": replace(one, batch=2048, ubatch=2048),
        "cache q8_0": replace(one, kv_type_k="q8_0", kv_type_v="q8_0"),
        "cache q4_0": replace(one, kv_type_k="q4_0", kv_type_v="q4_0"),
        "cache f32": replace(one, kv_type_k="f32", kv_type_v="f32"),
        "no flash attention": replace(one, flash_attention=False),
        "3 streams of 5000": replace(one, context=5000, sequences=3, streams=True),
        "ten layers": replace(all_, gpu_layers=10),
    }
    if devices > 1:
        uneven = (3.0, *(1.0,) * (devices - 1))
        made |= {"ten layers, uneven": replace(all_, gpu_layers=10, tensor_split=uneven), "split": all_}
        made |= {"uneven split": replace(all_, tensor_split=uneven), "split, ubatch 64": replace(all_, ubatch=64)}
        made |= {"split, cache q8_0": replace(all_, kv_type_k="q8_0", kv_type_v="q8_0")}
    return made


def main() -> None:
    native.start()
    devices = len(native.gpus())
    if not devices:
        sys.exit("llama.cpp sees no GPU here")
    visible = os.environ.get("GGML_VK_VISIBLE_DEVICES")
    command = f"GGML_VK_VISIBLE_DEVICES={shlex.quote(visible)} " if visible else ""
    print(f"## {devices} devices\n" if devices > 1 else "## 1 device\n")
    print(f"- {datetime.now(UTC):%Y-%m-%d}, `{command}python -m benchmarks.gpu_footprints`")
    print(f"- a {os.cpu_count()}-core {platform.machine().replace('_', '-')} machine, {platform.system()}")
    print(f"- llama-cpp-python {metadata.version('llama-cpp-python')}, build {llama_build.build()}")
    print("- devices: " + ", ".join(f"{name}: {text}" for name, text in named()) + "\n")
    print("| model | configuration | device | weights | cache | compute: load | dry run | closed form |")
    print("|---|---|---|---|---|---|---|---|")
    worst, under, total = 0.0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS:
            path = files.pull(files.read_catalog().get(model), Path(folder))
            for label, configuration in configurations(devices).items():
                for row in rows(path, configuration, devices):
                    total += 1
                    under += row["real"] > row["reserved"]
                    worst = max(worst, abs(row["dry"] / row["real"] - 1))
                    print(f"| {model} | {label} | {row['text']} |")
    print(f"\nLargest error of the dry run for a device: {worst:.1%} of its total. ", end="")
    print(f"More than the closed form and its margin: {under} of {total}.\n")


def named() -> list[tuple[str, str]]:
    """The name and the description of each device."""
    import ctypes

    name, text = (
        native.bound(f"ggml_backend_dev_{what}", ctypes.c_char_p) for what in ("name", "description")
    )  # fmt: skip
    return [(name(device).decode(), text(device).decode()) for device in native.gpus()]


def rows(path: Path, configuration: LoadConfiguration, devices: int) -> list[dict[str, Any]]:
    """The figures of each device: of a real load, the dry run, and the closed form."""
    request = {"path": str(path), "configuration": configuration.as_json(), "gpus": devices}
    dry = {buffer["gpu"]: buffer for buffer in probe.dry_run(request)["contexts"][0]["buffers"]}
    options = probe.options_of(configuration)
    model = llama.LlamaModel(path, options)
    context = llama.Context(model, options)
    real = {buffer["gpu"]: buffer for buffer in probe._buffers(context.pointer)}
    context.close()
    model.close()
    closed = closed_form.closed_form(header.read(path), configuration, gpus=devices)
    found = []
    for share in closed.shares:
        if share.place == HOST or share.place not in real:
            continue
        load, said = real[share.place], dry[share.place]
        sums = {key: sum(one[part] for part in ("model", "context", "compute")) for key, one in
                (("real", load), ("dry", said))}  # fmt: skip
        own = share.weights + share.cache + share.compute
        cells = [
            str(load["name"]),
            mark(load["model"], said["model"], share.weights),
            mark(load["context"], said["context"], share.cache),
            f"{load['compute'] / MIB:.2f} MiB",
            f"{said['compute'] - load['compute']:+,} B",
            f"{(share.compute - load['compute']) / MIB:+.2f} MiB",
        ]
        reserved = own + closed.margins[share.place]
        found.append({**sums, "reserved": reserved, "text": " | ".join(cells)})
    return found


def mark(load: int, said: int, closed: int) -> str:
    """The bytes of a load, and whether both sources have the same."""
    return f"{load:,} B" + (
        " =" if load == said == closed else f" (dry run {said - load:+,}, closed {closed - load:+,})"
    )


if __name__ == "__main__":
    main()

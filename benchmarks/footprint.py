"""
Footprints: what each source says that a model takes, against what a process really took, and the closed form against
llama.cpp's own dry runs for models whose weights are not here.

    python -m benchmarks.footprint            # two real models and 23 shapes: about ten minutes
    python -m benchmarks.footprint --quick    # a few of each
    python -m benchmarks.footprint --json FILE
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from app.catalog import files, header
from app.devices import llama_build
from app.footprint import closed_form, estimate
from app.footprint.closed_form import DEFAULT_PROCESS
from app.footprint.configuration import LoadConfiguration
from app.footprint.footprint import HOST, MIB, Footprint
from benchmarks import shapes

RESULTS = Path(__file__).parent / "results"

#: The configurations in which the real models are loaded.
BASE = LoadConfiguration(context=8192, sequences=8)
REAL: dict[str, LoadConfiguration] = {
    "4 x 2048": BASE,
    "4 x 512": replace(BASE, context=2048),
    "4 x 8192": replace(BASE, context=32768),
    "1 x 2048, none kept": replace(BASE, context=2048, sequences=1),
    "16 streams x 512": replace(BASE, context=8192, sequences=16, streams=True),
    "ubatch 128": replace(BASE, ubatch=128),
    "ubatch 2048": replace(BASE, batch=2048, ubatch=2048),
    "kv q8_0": replace(BASE, kv_type_k="q8_0", kv_type_v="q8_0"),
    "kv q4_0 / f16": replace(BASE, kv_type_k="q4_0"),
    "no flash attention": replace(BASE, context=2048, sequences=2, flash_attention=False),
    "windows": replace(BASE, swa_full=False),
    "not mapped": replace(BASE, mmap=False),
    "with vectors of 512": replace(BASE, context=2048, embedding=512),
}
QUICK = ("4 x 512", "kv q8_0", "no flash attention")
MODELS = ("smollm2:135m", "gemma3:270m")

#: Shapes that the formula for the buffers was not fitted to.
HELD_BACK = {"olmoe-1b-7b", "command-r7b", "starcoder2-7b", "qwen3-next-80b"}

#: The configurations of which llama.cpp is asked for the shapes; those that keep states are asked with two sequences.
SHAPED: dict[str, LoadConfiguration] = {
    **{name: one for name, one in REAL.items() if name not in {"not mapped", "with vectors of 512"}},
    "4 x 32768": replace(BASE, context=131072),
    "ubatch 32": replace(BASE, ubatch=32),
    "no flash attention, 4 x 2048": replace(BASE, flash_attention=False),
    "no flash attention, 4 x 8192": replace(BASE, context=32768, flash_attention=False),
    "no flash attention, ubatch 2048": replace(BASE, batch=2048, ubatch=2048, flash_attention=False),
    "kv q8_0, 4 x 8192": replace(BASE, context=32768, kv_type_k="q8_0", kv_type_v="q8_0"),
    "windows, 4 x 8192": replace(BASE, context=32768, swa_full=False),
    "windows, streams": replace(BASE, sequences=4, streams=True, swa_full=False),
    "3 streams of 5000": replace(BASE, context=5000, sequences=3, streams=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, default=RESULTS / "footprint.json")
    parser.add_argument("--only", choices=("real", "shapes"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(json.loads(given.child))
        return
    result: dict[str, Any] = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "load": os.getloadavg()},
        "llama-cpp-python": metadata.version("llama-cpp-python"),
        "build": llama_build.build(),
    }
    if given.only != "shapes":
        result["real"] = real(quick=given.quick)
    if given.only != "real":
        result["shapes"] = shaped(quick=given.quick)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{given.json}")


def real(*, quick: bool) -> list[dict[str, Any]]:
    """Each model in each configuration, loaded and used by a process of its own."""
    print(
        "model        configuration         closed form     dry run   real growth   errors             reserved besides"
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            path = files.pull(files.read_catalog().get(name), Path(folder))
            read = header.read(path)
            for label in QUICK if quick else REAL:
                configuration = REAL[label]
                identity = estimate.identify(read, configuration, ())
                closed, dry = closed_form.closed_form(read, configuration), estimate.dry_run(identity)
                grown = measured(path, configuration)
                # Matrices that were put into another order are in the mapped file too, from which they can be dropped.
                growth = grown["growth"] - (dry.copied if configuration.mmap else 0)
                sources = {"closed form": closed, "dry run": dry}
                predicted = {source: of_model(one) for source, one in sources.items()}
                errors = {source: size / growth - 1 for source, size in predicted.items()}
                spare = {source: predicted[source] + one.margins[HOST] - growth for source, one in sources.items()}
                rows.append(
                    {"model": name, "configuration": label, "predicted": predicted, "growth": growth, "errors": errors}
                    | {"spare": spare, "seen": grown, "copied": dry.copied, "given": configuration.as_json()}
                )
                sizes = [f"{size / MIB:8.1f} MiB" for size in (*predicted.values(), growth)]
                print(
                    f"{name:12} {label:20} {'  '.join(sizes)}   {'  '.join(f'{e:+7.1%}' for e in errors.values())}   "
                    + "  ".join(f"{size / MIB:6.1f} MiB" for size in spare.values())
                )
    for source in ("closed form", "dry run"):
        found = sorted(abs(row["errors"][source]) for row in rows)
        print(
            f"{source}: error median {statistics.median(found):.1%}, p95 {found[round(0.95 * (len(found) - 1))]:.1%}, "
            f"worst {found[-1]:.1%}; least {min(row['errors'][source] for row in rows):+.1%}; "
            f"under-reserved: {sum(row['spare'][source] < 0 for row in rows)} of {len(rows)}"
        )
    return rows


def of_model(footprint: Footprint) -> int:
    """What loading adds to a process: all but the process before, and what is parked."""
    host = next(share for share in footprint.shares if share.place == HOST)
    return host.total - host.parked - DEFAULT_PROCESS.base


def measured(path: Path, configuration: LoadConfiguration) -> dict[str, int]:
    """What a process of its own grew by."""
    question = json.dumps({"path": str(path), "configuration": configuration.as_json()})
    command = [sys.executable, "-m", "benchmarks.footprint", "--child", question]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(question: dict[str, Any]) -> None:
    """Load, compute a whole micro-batch and something in every slot, and say what was taken."""
    from app.inference.requests import EmbedRequest, GenerateRequest, LongText, Sampling
    from workers.engine.bindings import native, probe
    from workers.engine.engine import LlamaEngine

    configuration = LoadConfiguration.of_json(question["configuration"])
    options = probe.options_of(configuration)
    native.start()
    before = memory()
    engine = LlamaEngine(Path(question["path"]), options)
    loaded = memory()
    # The matrix of attention grows with the cells that are used: without flash attention all of them are.
    whole = engine.context_limit - 8 if not configuration.flash else min(options.ubatch, engine.context_limit - 8)
    for number in range(min(options.slots, 8)):
        prompt = "a " * (whole if number == 0 else 8)
        engine.generate(GenerateRequest(prompt=prompt, max_tokens=1, sampling=Sampling(temperature=0))).result()
    if configuration.embedding:
        engine.embed(EmbedRequest(texts=("a " * 2 * configuration.embedding,), long_text=LongText.TRUNCATE))
    used = memory()
    engine.close()
    growth = max(sum(used.values()), sum(loaded.values())) - sum(before.values())
    print(
        json.dumps(
            {"growth": growth, "before": sum(before.values()), "anonymous": used["RssAnon"], "files": used["RssFile"]}
        )
    )


def memory() -> dict[str, int]:
    """The resident bytes of this process, its own and those of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.partition(":")[0]: line.partition(":")[2].split() for line in lines}
    return {name: int(found[name][0]) * 1024 for name in ("RssAnon", "RssFile")}


def shaped(*, quick: bool) -> list[dict[str, Any]]:
    """The closed form against llama.cpp, for each shape."""
    print("\nshape              weights and caches   compute: error from, median, to   least error of the whole")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in list(shapes.SHAPES)[:: 5 if quick else 1]:
            read = header.read(shapes.write(name, Path(folder)))
            states = any(layer.state for layer in closed_form.caches.layers(read))
            cases = []
            for label, given in SHAPED.items():
                few = min(2, given.sequences)
                configuration = replace(given, sequences=few, streams=given.streams and few > 1) if states else given
                identity = estimate.identify(read, configuration, ())
                try:
                    dry = estimate.dry_run(identity).shares[0]
                except estimate.NoDryRun as error:
                    print(f"{name:18} {label}: {error}")
                    continue
                reckoned = closed_form.closed_form(read, configuration)
                closed = reckoned.shares[0]
                exact = (closed.weights, closed.cache) == (dry.weights, dry.cache)
                whole = dry.weights + dry.cache + dry.compute
                cases.append(
                    {"configuration": label, "exact": exact, "compute": dry.compute, "reckoned": closed.compute}
                    | {"covered": dry.compute <= closed.compute + reckoned.margins[HOST]}
                    | {"error": closed.compute / dry.compute - 1, "of_whole": (closed.compute - dry.compute) / whole}
                )
            errors = [case["error"] for case in cases]
            exact = sum(case["exact"] for case in cases)
            print(
                f"{name:18} {exact:3} of {len(cases)} equal      {min(errors):+7.1%} {statistics.median(errors):+7.1%} "
                f"{max(errors):+7.1%}        {min(case['of_whole'] for case in cases):+.2%}"
            )
            rows.append({"shape": name, "architecture": read.architecture, "cases": cases})
    for label, chosen in (("fitted", set(shapes.SHAPES) - HELD_BACK), ("held back", HELD_BACK)):
        cases = [case for row in rows if row["shape"] in chosen for case in row["cases"]]
        if not cases:
            continue
        errors = sorted(abs(case["error"]) for case in cases)
        print(
            f"{label}: {len(cases)} cases; error of the buffers median {statistics.median(errors):.1%}, "
            f"p95 {errors[round(0.95 * (len(errors) - 1))]:.1%}, worst {errors[-1]:.1%}; "
            f"margins too small in {sum(not case['covered'] for case in cases)}"
        )
    return rows


if __name__ == "__main__":
    main()

"""
The dry run: a program that reports the memory llama.cpp would allocate for a model and its contexts.

    python -m workers.engine.bindings.probe < REQUEST > RESULT

It runs as its own process. llama.cpp has no C interface for its memory breakdown: it is a std::map, which is read here
in libstdc++'s layout. With another build this may crash; the caller then only lacks the result.
The figures are cross-checked: the weights must agree with llama.cpp's public count, and caches and compute buffers must
have the same sizes in its log. Unconfirmed figures are not reported.

It allocates nothing and reads no weights, only the file's header. On GPUs it creates a driver context, as a load does.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp as api

from app.footprint.configuration import LoadConfiguration, draft_context
from app.kernel.errors import ArrieroError
from workers.engine import embedding
from workers.engine.bindings import llama, load_errors, native
from workers.engine.options import EngineOptions, KvLayout

_SYMBOL = "_Z26llama_get_memory_breakdownPK13llama_context"
#: Most slots of an engine.
_MAX_SLOTS = 128
#: More kinds of buffers than any machine has.
_MAX_BUFFERS = 64
#: Fraction of the weights that may be counted twice: embeddings that are also the output, nearly all of a small model.
_WEIGHTS_TOLERANCE = 1.0
#: Tolerance in bytes for the log's figures, which have two decimals of a MiB.
_LOG_TOLERANCE = 0.0051 * 2**20

_CACHE = re.compile(r"(?:kv_cache|memory_recurrent)\S*: size = +([\d.]+) MiB")
_COMPUTE = re.compile(r": +(\S+) compute buffer size = +([\d.]+) MiB")
_OUTPUT = re.compile(r"output buffer size = +([\d.]+) MiB")


class DryRunFailed(ArrieroError):
    """The dry run has no confirmed figures; the message is the reason."""


class _Map(ctypes.Structure):
    """A std::map in libstdc++'s layout: the header of its tree, and the number of nodes."""

    _fields_ = (
        ("compare", ctypes.c_uint64),
        ("color", ctypes.c_uint64),
        ("root", ctypes.c_void_p),
        ("leftmost", ctypes.c_void_p),
        ("rightmost", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
    )


class _Node(ctypes.Structure):
    """A node of the map: a buffer type, and its bytes."""

    _fields_ = (
        ("color", ctypes.c_uint64),
        ("parent", ctypes.c_void_p),
        ("left", ctypes.c_void_p),
        ("right", ctypes.c_void_p),
        ("kind", ctypes.c_void_p),
        ("model", ctypes.c_size_t),
        ("context", ctypes.c_size_t),
        ("compute", ctypes.c_size_t),
    )


def main() -> int:
    """Read one request from standard input, write the result to standard output. Returns the exit code."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        result = dry_run(json.load(sys.stdin))
    except ArrieroError as error:
        result = {"error": str(error)}
    json.dump(result, sys.stdout)
    return 0


def dry_run(request: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the buffers of each context, with their devices, for `{"path": …, "configuration": …, "gpus": …}`.

    With the path of a `draft` model, the result has also its context.

    Raises DryRunFailed, and the errors of loading a model.
    """
    path, configuration = Path(request["path"]), LoadConfiguration.of_json(request["configuration"])
    options = options_of(configuration)
    if not request["gpus"]:
        native.hide_gpus()
    native.start()
    if (seen := len(native.gpus())) != request["gpus"]:
        raise DryRunFailed(f"llama.cpp sees {seen} GPUs; the request names {request['gpus']}")
    model = _load(path, options)
    context_params = llama.context_params(options)
    contexts = [_measure_context(lambda: api.llama_init_from_model(model, context_params), model, path)]
    if configuration.embedding:
        params = embedding.context_params(options, api.llama_model_n_ctx_train(model))
        contexts.append(_measure_context(lambda: embedding.make_context(model, params), model, path))
    # The buffer of the outputs is of one for each sequence at first, and grows when a decode has more.
    contexts[0]["output"] += 4 * configuration.drafts * api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    api.llama_model_free(model)
    if not request.get("draft"):
        return {"contexts": contexts}
    path, own = Path(request["draft"]), llama.context_params(options_of(draft_context(configuration)))
    model = _load(path, options)
    drafting = _measure_context(lambda: api.llama_init_from_model(model, own), model, path)
    api.llama_model_free(model)
    return {"contexts": contexts, "draft": drafting}


def _load(path: Path, options: EngineOptions) -> Any:
    """Load a model without its weights. Raises the errors of loading a model."""
    llama.check_file(path)
    params, split = llama.model_params(options), (ctypes.c_float * api.LLAMA_MAX_DEVICES)(*options.tensor_split)
    params.no_alloc, params.load_mode = True, api.LLAMA_LOAD_MODE_NONE
    if options.tensor_split:
        params.tensor_split = ctypes.cast(split, ctypes.POINTER(ctypes.c_float))
    with _captured_log() as lines:
        model = api.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise load_errors.load_error(path, lines.problems)
    return model


def options_of(configuration: LoadConfiguration) -> EngineOptions:
    """Return engine options with this configuration. It does not contain the number of slots, so that is derived."""
    streams, most = configuration.streams, min(configuration.sequences, configuration.batch, _MAX_SLOTS)
    slots = configuration.sequences if streams else most
    return EngineOptions(
        slots=slots,
        context=configuration.context,
        layout=KvLayout.STREAMS if streams else KvLayout.UNIFIED,
        kept=None if streams else configuration.sequences - slots,
        batch=configuration.batch,
        ubatch=configuration.ubatch,
        threads=1,
        kv_type_k=configuration.kv_type_k,
        kv_type_v=configuration.kv_type_v,
        flash_attention=configuration.flash_attention,
        swa_full=configuration.swa_full,
        mmap=configuration.mmap,
        gpu_layers=configuration.gpu_layers,
        split_mode=configuration.split_mode,
        tensor_split=configuration.tensor_split,
        main_gpu=configuration.main_gpu,
        vectors=bool(configuration.embedding),
        embedding_context=configuration.embedding or 2048,
        pooling=configuration.pooling,
        park_bytes=configuration.parked,
        speculation="auto" if configuration.drafts else "off",
    )


def _measure_context(make: Callable[[], Any], model: Any, path: Path) -> dict[str, Any]:
    """Return the buffers of the model and of one of its contexts. Raises DryRunFailed unless they are confirmed."""
    with _captured_log() as lines:
        context = make()
        if not context:
            raise load_errors.load_error(path, lines.problems)
    buffers, log = list(_buffers(context)), lines.of_last_context()
    for buffer in buffers:
        if buffer["name"] == "CPU":  # where nothing is allocated, it is counted once for each device that shares it
            buffer["compute"] //= 1 + native.accelerators()
    _cross_check(buffers, api.llama_model_size(model), log)
    output = [float(found[1]) for line in log if (found := _OUTPUT.search(line))]
    if not output:
        raise DryRunFailed("llama.cpp's log does not contain the size of the output buffer")
    cells: int = api.llama_n_ctx(context)
    api.llama_free(context)
    return {"cells": cells, "output": math.ceil(output[-1] * 2**20 + _LOG_TOLERANCE), "buffers": buffers}


def _buffers(context: Any) -> Iterator[dict[str, Any]]:
    """Yield the memory breakdown by buffer type, each with the index of its GPU, or None for host memory."""
    if not hasattr(native.library, _SYMBOL):
        raise DryRunFailed("this build of llama.cpp does not export its memory breakdown")
    breakdown = native.bound(_SYMBOL, _Map)(context)
    if not 0 < breakdown.count < _MAX_BUFFERS:
        raise DryRunFailed(f"the memory breakdown has {breakdown.count} entries, so its layout is not the expected one")
    name, is_host = (
        native.bound("ggml_backend_buft_name", ctypes.c_char_p),
        native.bound("ggml_backend_buft_is_host", ctypes.c_bool),
    )
    device, gpus = native.bound("ggml_backend_buft_get_device", ctypes.c_void_p), native.gpus()
    for node in _nodes(breakdown.root, breakdown.count):
        label, gpu = name(node.kind).decode("ascii"), None
        if not is_host(node.kind):
            owner = device(node.kind)
            if owner in gpus:
                gpu = gpus.index(owner)
            elif not native.is_in_host_memory(owner):  # CPU buffers that hold repacked weights are host memory too
                raise DryRunFailed(
                    f"llama.cpp reports the buffers of all GPUs together ({label}), as it does with split_mode tensor"
                )
        yield {
            "name": label,
            "gpu": gpu,
            "model": node.model,
            "context": node.context,
            "compute": node.compute,
        }


def _nodes(root: int | None, count: int) -> Iterator[_Node]:
    """Yield the nodes of the tree. Raises DryRunFailed when their number differs from the map's count."""
    found, waiting = 0, [root]
    while waiting:
        address = waiting.pop()
        if not address:
            continue
        found += 1
        if found > count:
            break
        node = _Node.from_address(address)
        waiting += [node.left, node.right]
        yield node
    if found != count:
        raise DryRunFailed(
            f"the memory breakdown has {found} entries, its count is {count}; its layout is not the expected one"
        )


def _cross_check(buffers: Sequence[Mapping[str, Any]], weights: int, lines: Sequence[str]) -> None:
    """Raises DryRunFailed unless llama.cpp's count and its log confirm the figures."""
    model, cache = (sum(buffer[part] for buffer in buffers) for part in ("model", "context"))
    if not weights <= model <= weights * (1 + _WEIGHTS_TOLERANCE) + 2**20:
        raise DryRunFailed(f"the memory breakdown has {model:,} bytes of weights; llama.cpp counts {weights:,}")
    sizes = [float(found[1]) * 2**20 for line in lines if (found := _CACHE.search(line))]
    if abs(cache - sum(sizes)) > _LOG_TOLERANCE * max(len(sizes), 1):
        raise DryRunFailed(f"the memory breakdown has {cache:,} bytes of caches; the log has {sum(sizes):,.0f}")
    computes = {found[1]: float(found[2]) * 2**20 for line in lines if (found := _COMPUTE.search(line))}
    if not computes:
        raise DryRunFailed("llama.cpp's log does not contain a compute buffer")
    for buffer in buffers:
        if abs(buffer["compute"] - computes.get(buffer["name"], 0)) > _LOG_TOLERANCE:
            raise DryRunFailed(
                f"the memory breakdown has {buffer['compute']:,} bytes of compute buffers in {buffer['name']}; "
                f"the log has {computes.get(buffer['name'], 0):,.0f}"
            )


class _LogLines:
    """The lines that llama.cpp logged."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._problems: list[tuple[int, str]] = []
        self._open = ""

    def take(self, level: int, text: bytes, _: object) -> None:
        self._open += text.decode("utf-8", "replace")
        if self._open.endswith("\n"):
            line, self._open = self._open.strip(), ""
            self.all.append(line)
            if level >= native.WARN:
                self._problems.append((level, line))

    @property
    def problems(self) -> list[str]:
        """Errors, then warnings."""
        return [line for _, line in sorted(self._problems, key=lambda entry: -entry[0])]

    def of_last_context(self) -> list[str]:
        """Return the lines about the context created last: another may have been created and freed before."""
        begins = [number for number, line in enumerate(self.all) if "constructing llama_context" in line]
        return self.all[begins[-1] :] if begins else self.all


@contextmanager
def _captured_log() -> Iterator[_LogLines]:
    """Collect every log line of llama.cpp inside the block."""
    lines = _LogLines()
    callback = api.llama_log_callback(lines.take)
    api.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        native.install_log_callback()


if __name__ == "__main__":
    sys.exit(main())

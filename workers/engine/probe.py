"""
The dry run: what llama.cpp would allocate for a model and its contexts, found without allocating it.

    python -m workers.engine.probe < QUESTION > ANSWER

It is a process of its own. What it reads has no C interface: the breakdown of memory is a std::map, taken as libstdc++
lays it out, and with another build this may crash. Whoever asks then loses nothing but the answer.
Nothing that is read so is believed alone: the weights must be those that llama.cpp counts publicly, and caches and
compute buffers must stand in its log with the same sizes. What nothing confirms is no answer.

No weight is read: the file's header is enough. On GPUs it makes a context of the driver's, as the load after it will.
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

from app.footprint.configuration import LoadConfiguration
from app.kernel.errors import ArrieroError
from workers.engine import embedding, llama, native
from workers.engine.options import EngineOptions, KvLayout

_SYMBOL = "_Z26llama_get_memory_breakdownPK13llama_context"
#: Slots of an engine, at the most.
_MOST_SLOTS = 128
#: More kinds of buffers than any machine has.
_MOST_BUFFERS = 64
#: Parts of the weights that may be counted twice, or be padding: embeddings that are the output too, and alignment.
_DOUBLED = 0.5
#: Bytes by which the log's figures may differ, which have two decimals of a MiB.
_ROUNDING = 0.0051 * 2**20

_CACHE = re.compile(r"(?:kv_cache|memory_recurrent)\S*: size = +([\d.]+) MiB")
_COMPUTE = re.compile(r": +(\S+) compute buffer size = +([\d.]+) MiB")
_OUTPUT = re.compile(r"output buffer size = +([\d.]+) MiB")


class NoAnswer(ArrieroError):
    """The dry run gives no figures, and why."""


class _Map(ctypes.Structure):
    """A std::map of libstdc++: the header of its tree, and how many nodes there are."""

    _fields_ = (
        ("compare", ctypes.c_uint64),
        ("color", ctypes.c_uint64),
        ("root", ctypes.c_void_p),
        ("leftmost", ctypes.c_void_p),
        ("rightmost", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
    )


class _Node(ctypes.Structure):
    """A node of it: a kind of buffer, and its bytes."""

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
    """Answer one question; gives the exit code."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer = ask(json.load(sys.stdin))
    except ArrieroError as error:
        answer = {"error": str(error)}
    json.dump(answer, sys.stdout)
    return 0


def ask(question: Mapping[str, Any]) -> dict[str, Any]:
    """
    The answer to `{"path": …, "configuration": …, "gpus": …}`: the buffers of each context, and where they lie.

    Raises NoAnswer, and whatever a load raises.
    """
    path, configuration = Path(question["path"]), LoadConfiguration.of_json(question["configuration"])
    options = options_of(configuration)
    if not question["gpus"]:  # llama.cpp would compute on those that it sees, whatever lies there
        os.putenv("CUDA_VISIBLE_DEVICES", "")
    native.start()
    if (seen := len(_gpus())) != question["gpus"]:
        raise NoAnswer(f"llama.cpp sees {seen} GPUs, and {question['gpus']} were named")
    llama.check_file(path)
    params, split = llama.model_params(options), (ctypes.c_float * api.LLAMA_MAX_DEVICES)(*options.tensor_split)
    params.no_alloc, params.load_mode = True, api.LLAMA_LOAD_MODE_NONE
    if options.tensor_split:
        params.tensor_split = ctypes.cast(split, ctypes.POINTER(ctypes.c_float))
    with _log() as lines:
        model = api.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise llama.load_error(path, lines.told)
    context_params = llama.context_params(options)
    contexts = [_context(lambda: api.llama_init_from_model(model, context_params), model, path)]
    if configuration.embedding:
        params = embedding.context_params(options, api.llama_model_n_ctx_train(model))
        contexts.append(_context(lambda: embedding.make_context(model, params), model, path))
    api.llama_model_free(model)
    return {"contexts": contexts}


def options_of(configuration: LoadConfiguration) -> EngineOptions:
    """Options of an engine that has this configuration; the number of its slots is not in it."""
    streams, most = configuration.streams, min(configuration.sequences, configuration.batch, _MOST_SLOTS)
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
    )


def _context(make: Callable[[], Any], model: Any, path: Path) -> dict[str, Any]:
    """The buffers of the model and of one context of it."""
    with _log() as lines:
        context = make()
        if not context:
            raise llama.load_error(path, lines.told)
    buffers, said = list(_buffers(context)), lines.of_last_context()
    _check(buffers, api.llama_model_size(model), said)
    output = [float(found[1]) for line in said if (found := _OUTPUT.search(line))]
    if not output:
        raise NoAnswer("the log does not tell the size of the output buffer")
    cells: int = api.llama_n_ctx(context)
    api.llama_free(context)
    return {"cells": cells, "output": math.ceil(output[-1] * 2**20 + _ROUNDING), "buffers": buffers}


def _buffers(context: Any) -> Iterator[dict[str, Any]]:
    """The breakdown of memory, with the place among the GPUs that each kind of buffer has, or None for host memory."""
    if not hasattr(native.library, _SYMBOL):
        raise NoAnswer("this build of llama.cpp does not export its breakdown of memory")
    given = _bound(_SYMBOL, _Map)(context)
    if not 0 < given.count < _MOST_BUFFERS:
        raise NoAnswer(f"the breakdown of memory has {given.count} entries: it is laid out in another way")
    name, is_host = (
        _bound("ggml_backend_buft_name", ctypes.c_char_p),
        _bound("ggml_backend_buft_is_host", ctypes.c_bool),
    )
    device, gpus = _bound("ggml_backend_buft_get_device", ctypes.c_void_p), _gpus()
    for node in _nodes(given.root, given.count):
        label, place = name(node.kind).decode("ascii"), None
        if not is_host(node.kind):
            owner = device(node.kind)
            # Buffers of the CPU that hold weights in another order are its memory, too.
            place = gpus.index(owner) if owner in gpus else None
        yield {
            "name": label,
            "gpu": place,
            "model": node.model,
            "context": node.context,
            "compute": node.compute,
        }


def _nodes(root: int | None, count: int) -> Iterator[_Node]:
    """The nodes of the tree, which must be as many as it says."""
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
        raise NoAnswer(f"the breakdown of memory has {found} entries and says {count}: it is laid out in another way")


def _gpus() -> list[int]:
    """The devices of ggml that have memory of their own, in its order: that of CUDA_VISIBLE_DEVICES."""
    kind, get = _bound("ggml_backend_dev_type", ctypes.c_int), _bound("ggml_backend_dev_get", ctypes.c_void_p)
    get.argtypes = [ctypes.c_size_t]
    count = native.library.ggml_backend_dev_count
    count.restype, count.argtypes = ctypes.c_size_t, []
    devices = [get(index) for index in range(count())]
    return [device for device in devices if kind(device) == 1]  # GGML_BACKEND_DEVICE_TYPE_GPU


def _check(buffers: Sequence[Mapping[str, Any]], weights: int, lines: Sequence[str]) -> None:
    """Raise NoAnswer unless the figures are confirmed."""
    model, cache = (sum(buffer[part] for buffer in buffers) for part in ("model", "context"))
    if not weights <= model <= weights * (1 + _DOUBLED) + 2**20:
        raise NoAnswer(f"the breakdown has {model:,} bytes of weights, llama.cpp counts {weights:,}")
    told = [float(found[1]) * 2**20 for line in lines if (found := _CACHE.search(line))]
    if abs(cache - sum(told)) > _ROUNDING * max(len(told), 1):
        raise NoAnswer(f"the breakdown has {cache:,} bytes of caches, the log tells of {sum(told):,.0f}")
    computes = {found[1]: float(found[2]) * 2**20 for line in lines if (found := _COMPUTE.search(line))}
    if not computes:
        raise NoAnswer("the log tells of no compute buffer")
    for buffer in buffers:
        if abs(buffer["compute"] - computes.get(buffer["name"], 0)) > _ROUNDING:
            raise NoAnswer(
                f"the breakdown has {buffer['compute']:,} bytes to compute in {buffer['name']}, the log others"
            )


def _bound(name: str, result: Any) -> Any:
    """A function of one pointer."""
    function = getattr(native.library, name)
    function.restype, function.argtypes = result, [ctypes.c_void_p]
    return function


class _Lines:
    """What llama.cpp wrote."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._told: list[tuple[int, str]] = []
        self._open = ""

    def take(self, level: int, text: bytes, _: object) -> None:
        self._open += text.decode("utf-8", "replace")
        if self._open.endswith("\n"):
            line, self._open = self._open.strip(), ""
            self.all.append(line)
            if level >= native.WARN:
                self._told.append((level, line))

    @property
    def told(self) -> list[str]:
        """Errors, and then warnings."""
        return [line for _, line in sorted(self._told, key=lambda entry: -entry[0])]

    def of_last_context(self) -> list[str]:
        """The lines about the context that was made last: another may have been made and freed before."""
        begins = [number for number, line in enumerate(self.all) if "constructing llama_context" in line]
        return self.all[begins[-1] :] if begins else self.all


@contextmanager
def _log() -> Iterator[_Lines]:
    """Inside, every line of llama.cpp is gathered."""
    lines = _Lines()
    callback = api.llama_log_callback(lines.take)
    api.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        native.keep_log()


if __name__ == "__main__":
    sys.exit(main())

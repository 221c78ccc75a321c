"""Single operations of ggml's CPU backend, by its own kernels and by those of deploy/ggml-*.cpp."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from workers.engine.bindings import gemm, native

#: ggml's numbers of types; numbers of types are less than the last.
FLOAT, HALF, INT, _MOST_TYPES = 0, 1, 26, 40
#: Its kind of the CPU.
_CPU = 0
#: Bytes for the descriptions of a few tensors and a graph.
_GRAPH_BYTES = 1 << 20

Floats = npt.NDArray[np.float32]


class _InitParams(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class Backend:
    """ggml's CPU backend."""

    def __init__(self, threads: int) -> None:
        native.start()
        self.pointer = native.bound("ggml_backend_init_by_type", c_void_p, c_int, c_char_p)(_CPU, None)
        native.bound("ggml_backend_cpu_set_n_threads", None, c_void_p, c_int)(self.pointer, threads)
        name_of = native.bound("ggml_type_name", c_char_p, c_int)
        self.types = {(name_of(number) or b"").decode(): number for number in range(_MOST_TYPES)}

    def quantised(self, type_: str, weights: Floats) -> npt.NDArray[np.uint8]:
        """The weights, shape (rows, columns), in the type; each column is as important as the others."""
        rows, columns = weights.shape
        found, even = np.empty(self.bytes(type_, columns, rows), np.uint8), np.ones(columns, np.float32)
        quantise = native.bound(
            "ggml_quantize_chunk", c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p
        )
        quantise(self.types[type_], weights.ctypes.data, found.ctypes.data, 0, rows, columns, even.ctypes.data)
        return found

    def bytes(self, type_: str, columns: int, rows: int) -> int:
        """The size of a matrix of the type."""
        size: int = native.bound("ggml_row_size", c_size_t, c_int, c_int64)(self.types[type_], columns)
        return size * rows

    def allocate(self, tensor: int, size: int, *, repacked: bool) -> int:
        """Give a tensor of so many bytes a buffer, of the type in which ggml keeps what it repacks, or of the usual."""
        usual = native.bound("ggml_backend_cpu_buffer_type", c_void_p)
        usual.argtypes = []
        kind: int = usual()
        if repacked:
            device = native.bound("ggml_backend_get_device", c_void_p, c_void_p)(self.pointer)
            registry = native.bound("ggml_backend_dev_backend_reg", c_void_p, c_void_p)(device)
            find = native.bound("ggml_backend_reg_get_proc_address", c_void_p, c_void_p, c_char_p)
            found = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(
                find(registry, b"ggml_backend_dev_get_extra_bufts")
            )(device)
            kind = found[0] or 0
        buffer: int = native.bound("ggml_backend_buft_alloc_buffer", c_void_p, c_void_p, c_size_t)(kind, size + 4096)
        base = native.bound("ggml_backend_buffer_get_base", c_void_p, c_void_p)(buffer)
        native.bound("ggml_backend_tensor_alloc", c_int, c_void_p, c_void_p, c_void_p)(buffer, tensor, base)
        return buffer


class Operation:
    """An operation of ggml, in a graph of its own."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        init = native.bound("ggml_init", c_void_p, _InitParams)
        self._context: int = init(_InitParams(_GRAPH_BYTES, None, True))
        self._buffers: list[int] = []

    def tensor(self, type_: int, *shape: int) -> int:
        """A tensor whose first dimension is that of the columns."""
        new = native.bound("ggml_new_tensor_4d", c_void_p, c_void_p, c_int, *(c_int64,) * 4)
        found: int = new(self._context, type_, *(*shape, 1, 1, 1)[:4])
        return found

    def build(self, result: int, shape: tuple[int, ...], *given: tuple[int, npt.NDArray[Any]]) -> None:
        """Have it compute this tensor, which has that shape in numpy's order, from tensors with these values."""
        self._result, self.results = result, np.empty(shape, np.float32)
        self._graph = native.bound("ggml_new_graph", c_void_p)(self._context)
        native.bound("ggml_build_forward_expand", None, c_void_p, c_void_p)(self._graph, result)
        allocate = native.bound("ggml_backend_alloc_ctx_tensors", c_void_p, c_void_p, c_void_p)
        self._buffers.append(allocate(self._context, self._backend.pointer))
        fill = native.bound("ggml_backend_tensor_set", None, c_void_p, c_void_p, c_size_t, c_size_t)
        for tensor, values in given:
            fill(tensor, values.ctypes.data, 0, values.nbytes)

    def compute(self, bits: int) -> float:
        """Compute it with vectors of so many bits, or with ggml's kernels (0); returns the seconds that it takes."""
        gemm.use(bits)
        compute = native.bound("ggml_backend_graph_compute", c_int, c_void_p, c_void_p)
        begin = perf_counter()
        if compute(self._backend.pointer, self._graph):
            raise RuntimeError("ggml refused an operation")
        seconds = perf_counter() - begin
        read = native.bound("ggml_backend_tensor_get", None, c_void_p, c_void_p, c_size_t, c_size_t)
        read(self._result, self.results.ctypes.data, 0, self.results.nbytes)
        return seconds

    def close(self) -> None:
        """Free its memory."""
        for buffer in self._buffers:
            native.bound("ggml_backend_buffer_free", None, c_void_p)(buffer)
        native.bound("ggml_free", None, c_void_p)(self._context)


def measure(ggml: Operation, ours: Operation, bits: int, turns: int) -> tuple[float, float, float]:
    """Seconds by ggml's kernels and by these, and the difference of their results."""
    best, results = [float("inf")] * 2, [ours.results] * 2
    for _ in range(turns):
        for number, (product, used) in enumerate(((ggml, 0), (ours, bits))):
            best[number] = min(best[number], product.compute(used))
            results[number] = product.results.copy()
    error = np.linalg.norm(results[0] - results[1]) / np.linalg.norm(results[0])
    return best[0], best[1], float(error)


def numbers(value: str) -> list[int]:
    """Whole numbers above 0 with commas between them, of a command line."""
    found = [int(number) for number in value.split(",")]
    if min(found) < 1:
        raise ValueError(value)
    return found

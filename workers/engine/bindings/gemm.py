"""
The products of deploy/ggml-gemm.cpp: on CPUs, prompts of models in Q4_1 and Q5_1 are computed twice as fast.

The library is compiled with llama.cpp, and takes the matrix product from OpenBLAS (PyPI `scipy-openblas32`). Where one
of the two is missing, llama.cpp computes these products itself.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from functools import cache
from pathlib import Path

import llama_cpp as api
import structlog

from workers.engine.bindings import native

_LOG = structlog.get_logger(__name__)
_LIBRARY = Path(api.__file__).parent / "lib" / "libarriero-gemm.so"
_lock = threading.Lock()


def load() -> bool:
    """
    Have llama.cpp use the products in the contexts that are created from now on. Returns whether it does.

    Not beside a GPU: ggml would no longer send it the products of layers whose weights are in host memory.
    """
    with _lock:
        return _load()


@cache
def _load() -> bool:
    blas = _openblas()
    if blas is None or not _LIBRARY.is_file() or native.gpus():
        return False
    try:
        product = ctypes.cast(_without_threads(blas).scipy_cblas_sgemm, ctypes.c_void_p)
        ctypes.CDLL(str(_LIBRARY)).arriero_gemm_use(product)
    except (OSError, AttributeError) as error:
        _LOG.warning("engine_products_missing", reason=str(error))
        return False
    register = native.bound("ggml_backend_load", ctypes.c_void_p, ctypes.c_char_p)
    if not register(os.fsencode(_LIBRARY)):
        _LOG.warning("engine_products_missing", reason="ggml has another version of the interface of its devices")
        return False
    return True


def _openblas() -> Path | None:
    found = importlib.util.find_spec("scipy_openblas32")
    if found is None or found.origin is None:
        return None
    library = Path(found.origin).parent / "lib" / "libscipy_openblas.so"
    return library if library.is_file() else None


def _without_threads(library: Path) -> ctypes.CDLL:
    """Load OpenBLAS so that it starts no threads: it reads the variable of the environment once."""
    os.putenv("OPENBLAS_NUM_THREADS", "1")
    return ctypes.CDLL(str(library))

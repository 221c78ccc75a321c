"""
The products of deploy/ggml-gemm.cpp: processors with x86-64 multiply Q4_1, Q5_0, Q5_1 and Q8_0 weights faster.

They are compiled into ggml's CPU backend together with llama.cpp. Where llama.cpp was built without them, or the
processor lacks the instructions, ggml's own kernels compute these products.
"""

from __future__ import annotations

import ctypes

from workers.engine.bindings import native

#: Bits of the vectors: AVX-512 with VNNI, and AVX2, which leaves Q8_0 to ggml.
AVX512, AVX2 = 512, 256


def use(bits: int = AVX512) -> int:
    """
    Have ggml use the products from now on, with vectors of so many bits at most; 0 for none.

    Returns the bits of the vectors that are used, 0 where there are no products.
    """
    if not hasattr(native.library, "arriero_products_use"):
        return 0
    found: int = native.bound("arriero_products_use", ctypes.c_int, ctypes.c_int)(bits)
    return found

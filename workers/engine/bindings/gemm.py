"""
The products of deploy/ggml-gemm.cpp: processors with x86-64 multiply most types of quantised weights faster.

With AVX-512 they come with the attention of deploy/ggml-attention.cpp. They are compiled into ggml's CPU backend with
llama.cpp. Where llama.cpp was built without them, or the processor lacks the instructions, ggml's own kernels
compute these operations.
"""

from __future__ import annotations

import ctypes

from workers.engine.bindings import native

#: Bits of the vectors: AVX-512 with VNNI, and AVX2, which leaves types with values of eight bits to ggml.
AVX512, AVX2 = 512, 256


def use(bits: int = AVX512) -> int:
    """
    Have ggml use the products and the attention from now on, with vectors of so many bits at most; 0 for none.

    Returns the bits of the vectors that are used, 0 where there are no products.
    """
    if not hasattr(native.library, "arriero_products_use"):
        return 0
    found: int = native.bound("arriero_products_use", ctypes.c_int, ctypes.c_int)(bits)
    return found


def replace_repacking() -> bool:
    """
    Use the products, and return whether they make ggml's own preparation of weights needless.

    It copies weights into another order when a file is loaded, for kernels that are slower than these. For processors
    with AMX it is the only way to their instructions.
    """
    return use() > 0 and not native.library.ggml_cpu_has_amx_int8()

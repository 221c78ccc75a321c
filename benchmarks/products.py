"""
Products of quantised weights and several tokens: deploy/ggml-gemm.cpp beside ggml's own kernels.

A matrix of weights with 2,048 columns and 1,536 rows is multiplied by the activations of so many tokens, by both in
turns; each figure is the shortest of the turns. The error is that of the results: the norm of their difference by that
of ggml's. Types that the products leave to ggml have the ratio 1. With `--experts 32,4` there are 32 such matrices, and
each token has four of them. With `--repacked`, ggml's kernels are those for weights that it repacks when a file is
loaded. With `--model`, whole decodes of a model are measured instead: a token of so many texts, after 100 tokens each,
and that many tokens of a prompt.

`python -m benchmarks.products [--model FILE] [--threads N] [--bits 256|512] [--types NAME,…] [--tokens N,…]`
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from ctypes import c_void_p
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from benchmarks.ggml import FLOAT, INT, Backend, Floats, Operation, measure, numbers
from workers.engine.bindings import gemm, native
from workers.engine.bindings.llama import Context, LlamaModel
from workers.engine.options import EngineOptions, KvLayout

COLUMNS, ROWS = 2048, 1536
#: Those with products; the others can be measured, too, and take what they take with ggml's kernels.
TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "mxfp4", "iq4_xs", "q4_K", "q5_K", "q6_K")
OTHERS = (
    "f16", "bf16", "q2_K", "q3_K", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s",
)  # fmt: skip
#: Those that ggml repacks for x86.
REPACKED = ("q4_0", "q4_K", "iq4_nl", "mxfp4", "q2_K")
#: Most texts of a decode, and the tokens of each before it.
_SLOTS, _BEFORE = 32, 100

Experts = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Cell:
    """Seconds of a product or a decode, and the difference of the results where they are compared."""

    type: str
    tokens: int
    kernels: float
    products: float
    error: float | None = None

    def __str__(self) -> str:
        ratio, kernels, products = self.kernels / self.products, self.kernels * 1e3, self.products * 1e3
        error = "" if self.error is None else f"; {self.error:.4f}"
        return f"{self.tokens}: {ratio:.2f} ({kernels:.2f}, {products:.2f}{error})"


class Product(Operation):
    """
    The product of quantised weights, with so many rows, and of activations, shape (tokens, columns).

    With experts, shape (tokens, used), the weights are those of all of them one after the other, activations have the
    shape (tokens, 1 or used, columns), and results (tokens, used, rows).
    """

    def __init__(
        self,
        backend: Backend,
        type_: str,
        weights: npt.NDArray[np.uint8],
        rows: int,
        activations: Floats,
        experts: Experts | None = None,
        *,
        repacked: bool = False,
    ) -> None:
        super().__init__(backend)
        columns, pointers = activations.shape[-1], (c_void_p,) * 3
        left = self.tensor(backend.types[type_], columns, rows, weights.nbytes // backend.bytes(type_, columns, rows))
        right = self.tensor(FLOAT, *reversed(activations.shape))
        # Weights have a buffer of their own, as ggml would choose for them when it loads a file.
        self._buffers.append(backend.allocate(left, weights.nbytes, repacked=repacked))
        given: list[tuple[int, npt.NDArray[Any]]] = [(left, weights), (right, activations)]
        if experts is None:
            result = native.bound("ggml_mul_mat", c_void_p, *pointers)(self._context, left, right)
            self.build(result, (len(activations), rows), *given)
        else:
            chosen = self.tensor(INT, *reversed(experts.shape))
            result = native.bound("ggml_mul_mat_id", c_void_p, *pointers, c_void_p)(self._context, left, right, chosen)
            self.build(result, (*experts.shape, rows), *given, (chosen, experts))


def decodes(path: Path, asked: argparse.Namespace) -> list[Cell]:
    """Whole decodes, beside a model that ggml has repacked: the median of the turns."""
    most = max(asked.tokens)
    slots = min(most, _SLOTS)
    options = {"slots": slots, "context": slots * 1024, "layout": KvLayout.STREAMS, "vectors": False}
    options |= {"threads": asked.threads, "threads_batch": asked.threads}
    contexts = {}
    for bits in (0, asked.bits):
        with mock.patch.object(gemm, "replace_repacking", return_value=bits > 0):
            contexts[bits] = Context(LlamaModel(path, EngineOptions(**options)), EngineOptions(**options))
    tokens = [7 + 13 * number % 40_000 for number in range(most + _BEFORE + slots)]
    for context in contexts.values():
        for slot in range(slots):
            context.decode([(slot, 0, tokens[:_BEFORE], 1)])
    texts = [
        ("texts", n, [(slot, _BEFORE, [tokens[slot]], 1) for slot in range(n)]) for n in asked.tokens if n <= slots
    ]
    prompts = [("prompt", n, [(0, _BEFORE, tokens[:n], 1)]) for n in asked.tokens if n > 1]
    found = []
    for kind, count, chunks in texts + prompts:
        took: dict[int, list[float]] = {0: [], asked.bits: []}
        for _ in range(asked.turns):
            for bits, seconds in took.items():
                gemm.use(bits)
                begin, context = perf_counter(), contexts[bits]
                if context.decode(chunks):
                    sys.exit(f"{kind} {count}: the decode failed")
                seconds.append(perf_counter() - begin)
                for slot, *_ in chunks:
                    context.truncate(slot, _BEFORE)
        found.append(Cell(kind, count, *map(statistics.median, took.values())))
        print(kind, found[-1], flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table and one JSON document."""
    asked = _parser().parse_args(arguments)
    if not gemm.use(asked.bits):
        sys.exit("llama.cpp was built without deploy/ggml-gemm.cpp, or the processor lacks the instructions")
    found = decodes(asked.model, asked) if asked.model else products(asked)
    if asked.json:
        asked.json.write_text(
            json.dumps({"threads": asked.threads, "bits": asked.bits, "products": list(map(asdict, found))}, indent=1)
        )


def products(asked: argparse.Namespace) -> list[Cell]:
    """Products by type: print the table."""
    backend, random = Backend(asked.threads), np.random.default_rng(1)
    matrices, used = asked.experts
    weights = random.standard_normal((matrices * ROWS, COLUMNS), np.float32)
    shape = (COLUMNS,) if matrices == 1 else (1, COLUMNS)
    activations = [random.standard_normal((tokens, *shape), np.float32) for tokens in asked.tokens]
    chosen = [np.argsort(random.random((tokens, matrices)))[:, :used].astype(np.int32) for tokens in asked.tokens]
    print("times as fast as ggml's kernels, by tokens; in brackets ms of both, and the difference of the results")
    found: list[Cell] = []
    for type_ in asked.types:
        quantised, row = backend.quantised(type_, weights), []
        for each, experts in zip(activations, chosen, strict=True):
            given = (backend, type_, quantised, ROWS, each, experts if matrices > 1 else None)
            two = (Product(*given, repacked=asked.repacked and type_ in REPACKED), Product(*given))
            row.append(Cell(type_, len(each), *measure(*two, asked.bits, asked.turns)))
            for product in two:
                product.close()
        print(f"{type_:8}", *map(str, row), sep="  ", flush=True)
        found += row
    return found


def _parser() -> argparse.ArgumentParser:
    def types(value: str) -> list[str]:
        able = (*TYPES, *OTHERS)
        if wrong := ", ".join(name for name in value.split(",") if name not in able):
            raise argparse.ArgumentTypeError(f"no type {wrong}; there are {', '.join(able)}")
        return value.split(",")

    def experts(value: str) -> list[int]:
        if len(found := numbers(value)) != 2 or not 1 <= found[1] <= found[0]:
            raise argparse.ArgumentTypeError(f"{value} is not the number of experts and how many a token uses: 32,4")
        return found

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="FILE", help="measure its decodes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bits", type=int, choices=(256, 512), default=512, help="of the vectors")
    parser.add_argument("--types", type=types, default=list(TYPES), metavar="NAME,…")
    parser.add_argument("--tokens", type=numbers, default=[1, 2, 4, 8, 16, 64, 512], metavar="N,…")
    parser.add_argument("--experts", type=experts, default=[1, 1], metavar="N,USED", help="so many, used for a token")
    parser.add_argument("--repacked", action="store_true", help="beside ggml's kernels for repacked weights")
    parser.add_argument("--turns", type=int, default=12, help="of each product, by each of the two")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go")
    return parser


if __name__ == "__main__":
    main()

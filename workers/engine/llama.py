"""
A model and its context, as the engine needs them: loading, tokens, decoding, sequences. llama.cpp's traps end here.

Whatever would make llama.cpp abort the process is refused before it is called; its error codes become our errors.
Each change of a sequence is checked against the positions that are really there: with sliding windows and recurrent
layers llama.cpp says yes and does something else.

A context belongs to one thread. A model may be read by many.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import llama_cpp as api
import numpy as np
import numpy.typing as npt
import psutil

from app.catalog.source import split_parts
from app.kernel.errors import (
    AllocationFailed,
    MemoryNotEnough,
    ModelFileDamaged,
    ModelFileMissing,
    ModelFileUnusable,
    ModelUnsupported,
)
from workers.engine import calls, native
from workers.engine.options import KV_BYTES, KV_TYPES, EngineOptions

#: Logits of a decode: one row for each output.
Logits = npt.NDArray[np.float32]

#: llama.cpp's numbers for pooling, as texts of a header.
POOLING = {"1": "mean", "2": "cls", "3": "last", "4": "rank"}
_SPLIT = {"none": 0, "layer": 1, "row": 2, "tensor": 3}
_ROPE = {"none": 0, "linear": 1, "yarn": 2, "longrope": 3}
_TAGS = (calls.OPENING.encode(), calls.CLOSING.encode())
_ALLOCATION = re.compile(r"(?:unable|failed) to allocate|out of memory|bad_alloc|cudaMalloc failed", re.IGNORECASE)
_SIZE = re.compile(r"of size ([\d.]+)(?: (MiB|GiB))?")


class LlamaModel:
    """The weights and the vocabulary. Many threads may ask it for tokens."""

    def __init__(self, path: Path, options: EngineOptions, on_progress: Callable[[float], None] | None = None) -> None:
        """
        Load the file. `on_progress` gets numbers from 0 to 1.

        Raises ModelFileMissing, ModelFileDamaged, ModelUnsupported or MemoryNotEnough, each with the reason.
        """
        native.start()
        check_file(path)
        _check_weights(path, options)
        self.path, self.options = path, options
        self._progress = api.llama_progress_callback(
            lambda done, _: (on_progress(done) if on_progress else None, True)[1]
        )
        params, self._split = model_params(options), (ctypes.c_float * api.LLAMA_MAX_DEVICES)(*options.tensor_split)
        if options.tensor_split:
            params.tensor_split = ctypes.cast(self._split, ctypes.POINTER(ctypes.c_float))
        params.progress_callback = self._progress
        with native.lines() as lines:
            self.pointer: Any = api.llama_model_load_from_file(os.fsencode(path), params)
            if not self.pointer:
                raise load_error(path, lines())
        self.architecture: str = self.meta("general.architecture") or ""
        self.vocab: Any = api.llama_model_get_vocab(self.pointer)
        self.n_vocab: int = api.llama_vocab_n_tokens(self.vocab)
        self.n_embd: int = api.llama_model_n_embd_out(self.pointer)
        self.n_context_trained: int = api.llama_model_n_ctx_train(self.pointer)
        self.window: int = api.llama_model_n_swa(self.pointer)
        self.recurrent: bool = api.llama_model_is_recurrent(self.pointer) or api.llama_model_is_hybrid(self.pointer)
        #: False for encoders alone; whether a decoder writes texts is seen by its context's memory.
        self.decodes: bool = api.llama_model_has_decoder(self.pointer)
        #: How vectors are pooled, as the file says; None where it says nothing.
        self.pooling: str | None = POOLING.get(self.meta(f"{self.architecture}.pooling_type") or "")
        self.adds_bos: bool = api.llama_vocab_get_add_bos(self.vocab)
        self.bos: int = api.llama_vocab_bos(self.vocab)
        self.eos: int = api.llama_vocab_eos(self.vocab)
        kinds = [api.llama_vocab_get_attr(self.vocab, token) for token in range(self.n_vocab)]
        self.ends = frozenset(token for token in range(self.n_vocab) if api.llama_vocab_is_eog(self.vocab, token))
        special = api.LLAMA_TOKEN_ATTR_CONTROL | api.LLAMA_TOKEN_ATTR_UNKNOWN
        self._pieces: dict[tuple[int, bool], bytes] = {}
        #: Tokens with a meaning of their own that no text may bring in.
        self.controls = tuple(token for token, kind in enumerate(kinds) if kind & special)
        # Some families make what goes around a call a control token: it is written as text all the same.
        tags = [token for token in self.controls if self.piece(token, special=True) in _TAGS]
        self._pieces |= {(token, False): self.piece(token, special=True) for token in tags}
        barred = [token for token in self.controls if token not in self.ends and token not in tags]
        self.controls_array = np.array(barred, np.intp)

    def close(self) -> None:
        """Free it. The contexts are freed before."""
        if self.pointer:
            api.llama_model_free(self.pointer)
            self.pointer = None

    def tokens(self, text: str, *, opening: bool, special: bool) -> list[int]:
        """Tokens of a text. `opening` adds what the model wants first; `special` lets texts name control tokens."""
        data = text.encode("utf-8", "replace")
        room = len(data) + 8
        buffer = (ctypes.c_int32 * room)()
        count = native.tokenize(self.vocab, data, len(data), buffer, room, opening, special)
        if count < 0:
            buffer = (ctypes.c_int32 * -count)()
            count = native.tokenize(self.vocab, data, len(data), buffer, -count, opening, special)
        return buffer[:count]

    def pair(self, first: str, second: str) -> list[int]:
        """
        Tokens of two texts that are judged together, with what the vocabulary puts before, between and after.

        As llama.cpp's server does; but where the file names no token that ends a text, the one that parts texts ends
        the second too: so BERT was trained, `[CLS] a [SEP] b [SEP]`.
        """
        vocab = self.vocab
        parting: int = api.llama_vocab_sep(vocab)
        ending = self.eos if self.eos >= 0 else parting
        ends, parts = api.llama_vocab_get_add_eos(vocab), api.llama_vocab_get_add_sep(vocab)
        tokens = [self.bos] if self.adds_bos else []
        tokens += self.tokens(first, opening=False, special=False)
        tokens += [ending] * ends + [parting] * parts
        tokens += self.tokens(second, opening=False, special=False)
        tokens += [ending] * (ends or (parts and self.eos < 0))
        return [token for token in tokens if token >= 0]

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes that a token stands for; those of a control token are empty unless `special`."""
        known = self._pieces.get((token, special))
        if known is not None:
            return known
        size = 64
        buffer = ctypes.create_string_buffer(size)
        count = native.token_to_piece(self.vocab, token, buffer, size, 0, special)
        if count < 0:
            size = -count
            buffer = ctypes.create_string_buffer(size)
            count = native.token_to_piece(self.vocab, token, buffer, size, 0, special)
        self._pieces[token, special] = piece = buffer.raw[:count]
        return piece

    def chat_template(self, name: str | None = None) -> str | None:
        """The Jinja source in the file."""
        found = api.llama_model_chat_template(self.pointer, None if name is None else name.encode())
        return None if found is None else found.decode("utf-8", "replace")

    def meta(self, key: str) -> str | None:
        """A value of the file's header, as text."""
        buffer = ctypes.create_string_buffer(4096)
        count = api.llama_model_meta_val_str(self.pointer, key.encode(), buffer, len(buffer))
        return None if count < 0 else buffer.value.decode("utf-8", "replace")


class Batch:
    """The tokens of a decode, in arrays that llama.cpp reads in place."""

    def __init__(self, size: int, sequences: int) -> None:
        self.tokens, self.positions = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self.wanted, self._counts = np.zeros(size, np.int8), np.ones(size, np.int32)
        self._ids = np.arange(sequences, dtype=np.int32)
        self._owners, self._steps = np.zeros(size, np.uint64), np.arange(size, dtype=np.int32)
        self._addresses = [int(self._ids.ctypes.data) + 4 * sequence for sequence in range(sequences)]
        integers = ctypes.POINTER(ctypes.c_int32)
        batch = cast(Any, api.llama_batch())
        batch.token, batch.pos = self.tokens.ctypes.data_as(integers), self.positions.ctypes.data_as(integers)
        batch.n_seq_id = self._counts.ctypes.data_as(integers)
        batch.seq_id = self._owners.ctypes.data_as(ctypes.POINTER(integers))
        batch.logits = self.wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        self._batch = batch

    def put(self, at: int, sequence: int, first: int, part: Sequence[int]) -> None:
        """Place a sequence's tokens, from position `first`; none of them gives an output yet."""
        end = at + len(part)
        self.tokens[at:end] = part
        self.positions[at:end] = self._steps[: end - at] + first
        self._owners[at:end] = self._addresses[sequence]
        self.wanted[at:end] = 0

    def put_singles(self, pieces: Sequence[tuple[int, int, Sequence[int], bool]]) -> None:
        """Place pieces of one token each."""
        size, addresses = len(pieces), self._addresses
        self.tokens[:size] = [part[0] for _, _, part, _ in pieces]
        self.positions[:size] = [first for _, first, _, _ in pieces]
        self._owners[:size] = [addresses[sequence] for sequence, *_ in pieces]
        self.wanted[:size] = [ends for *_, ends in pieces]

    def of(self, size: int) -> Any:
        """What llama.cpp takes: the first `size` tokens."""
        self._batch.n_tokens = size
        return self._batch


class Context:
    """A KV cache with its sequences, and the decoding on it. It belongs to one thread."""

    def __init__(self, model: LlamaModel, options: EngineOptions) -> None:
        self.model, self.options = model, options
        self.pointer: Any = None
        _check_memory(model, options)
        params = context_params(options)
        with native.lines() as lines:
            self.pointer = api.llama_init_from_model(model.pointer, params)
            if not self.pointer:
                raise load_error(model.path, lines())
        self.memory: Any = api.llama_get_memory(self.pointer)
        self.n_context: int = api.llama_n_ctx(self.pointer)
        #: Cells that one sequence may hold at the most.
        self.n_sequence: int = min(self.n_context, api.llama_n_ctx_seq(self.pointer))
        self.n_batch: int = api.llama_n_batch(self.pointer)
        self._batch = Batch(self.n_batch, options.sequences)

    def close(self) -> None:
        """Free it."""
        if self.pointer:
            api.llama_free(self.pointer)
            self.pointer = None

    def decode(self, pieces: Sequence[tuple[int, int, Sequence[int], bool]]) -> int:
        """
        Compute pieces: (sequence, first position, tokens, whether the last one gives logits).

        Gives llama.cpp's code: 0 is well, 1 no cells, 2 aborted, negative an error.
        """
        size = sum([len(part) for _, _, part, _ in pieces])
        if not 0 < size <= self.n_batch:
            raise AssertionError(f"a batch of {size} tokens, {self.n_batch} are allowed")
        batch = self._batch
        if size == len(pieces):  # a token each: the common case
            batch.put_singles(pieces)
        else:
            at = 0
            for sequence, first, part, ends in pieces:
                batch.put(at, sequence, first, part)
                at += len(part)
                batch.wanted[at - 1] = ends
        return int(native.decode(self.pointer, batch.of(size)))

    def logits(self, rows: int) -> Logits:
        """The logits of the last decode, a row for each output, in the order of the batch. They may be written to."""
        return np.ctypeslib.as_array(native.logits(self.pointer), shape=(rows, self.model.n_vocab))

    def copy(self, source: int, target: int, count: int) -> bool:
        """Give the empty sequence `target` the first `count` tokens of `source`. False: it is empty as before."""
        if self.options.streams:
            native.seq_cp(self.memory, source, target, -1, -1)
            return self.cut(target, count)
        native.seq_cp(self.memory, source, target, 0, count)
        return self._holds(target, count) or self._dropped(target)

    def cut(self, sequence: int, count: int) -> bool:
        """Keep the first `count` tokens. False: they could not be kept, and the sequence is empty now."""
        if count <= 0:
            return self.drop(sequence)
        removed = native.seq_rm(self.memory, sequence, count, -1)
        return (removed and self._holds(sequence, count)) or self._dropped(sequence)

    def drop(self, sequence: int) -> bool:
        """Empty the sequence."""
        return bool(native.seq_rm(self.memory, sequence, -1, -1))

    def positions(self, sequence: int) -> tuple[int, int]:
        """The first and the last position that are there; -1 for none."""
        return native.pos_min(self.memory, sequence), native.pos_max(self.memory, sequence)

    def save(self, sequence: int) -> npt.NDArray[np.uint8]:
        """The state of the sequence, in host memory."""
        size = native.state_size(self.pointer, sequence)
        data = np.empty(size, np.uint8)
        written = native.state_get(self.pointer, data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)), size, sequence)
        return data[:written]

    def state_bytes(self, sequence: int) -> int:
        """Bytes that `save` would take."""
        return int(native.state_size(self.pointer, sequence))

    def restore(self, sequence: int, data: npt.NDArray[np.uint8], count: int) -> bool:
        """Write a state of `count` tokens back into an empty sequence. False: it is empty as before."""
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        read = native.state_set(self.pointer, pointer, len(data), sequence)
        return (read == len(data) and self._holds(sequence, count)) or self._dropped(sequence)

    def clear(self) -> None:
        """Empty all sequences."""
        api.llama_memory_clear(self.memory, False)

    def use_loras(self, adapters: Sequence[tuple[Any, float]]) -> None:
        """Let these adapters, and no others, work on every decode from now on."""
        use_loras(self.pointer, adapters)

    def use_threads(self, count: int) -> None:
        """Compute on so many cores from now on."""
        api.llama_set_n_threads(self.pointer, count, count)

    def _holds(self, sequence: int, count: int) -> bool:
        first, last = self.positions(sequence)
        # A sliding window needs only the positions that the next token looks at.
        needed = max(0, count - self.model.window) if self.model.window else 0
        recurrent = self.model.recurrent
        return last == count - 1 and (recurrent or 0 <= first <= needed)

    def _dropped(self, sequence: int) -> bool:
        self.drop(sequence)
        return False


def check_file(path: Path) -> None:
    """Raise ModelFileMissing or ModelFileDamaged for what is no GGUF file at a glance."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except FileNotFoundError:
        raise ModelFileMissing(f"{path} does not exist") from None
    except OSError as error:
        raise ModelFileUnusable(f"{path} cannot be read: {error.strerror}") from error
    if head[:4] != b"GGUF":
        raise ModelFileDamaged(path, "it does not begin with the letters GGUF")


def load_loras(model: LlamaModel) -> dict[str, tuple[Any, float]]:
    """The adapters of the options, by name, with their weights. Raises ModelUnsupported."""
    adapters = {}
    for lora in model.options.loras:
        check_file(lora.path)
        with native.lines() as lines:
            pointer = api.llama_adapter_lora_init(model.pointer, os.fsencode(lora.path))
            if not pointer:
                raise ModelUnsupported(lora.path, _reason(lines()) or "it is no adapter of this model")
        adapters[lora.name] = (pointer, lora.scale)
    return adapters


def use_loras(context: Any, adapters: Sequence[tuple[Any, float]]) -> None:
    """Let these adapters, and no others, work on what a context of llama.cpp computes from now on."""
    used = [(pointer, scale) for pointer, scale in adapters if scale]
    pointers = (api.llama_adapter_lora_p_ctypes * max(1, len(used)))(*[pointer for pointer, _ in used])
    scales = (ctypes.c_float * max(1, len(used)))(*[scale for _, scale in used])
    api.llama_set_adapters_lora(context, pointers, len(used), scales)


def model_params(options: EngineOptions) -> Any:
    """What llama.cpp is told of the model. The dry run is told the same."""
    params = api.llama_model_default_params()
    params.n_gpu_layers = options.gpu_layers
    params.split_mode = _SPLIT[options.split_mode]
    params.main_gpu = options.main_gpu
    params.load_mode = (api.LLAMA_LOAD_MODE_MMAP if options.mmap else api.LLAMA_LOAD_MODE_NONE) | (
        api.LLAMA_LOAD_MODE_MLOCK if options.mlock else 0
    )
    return params


def context_params(options: EngineOptions) -> Any:
    """What llama.cpp is told of the context. The dry run is told the same."""
    params = api.llama_context_default_params()
    params.n_ctx = options.context
    params.n_batch = options.batch
    params.n_ubatch = min(options.batch, options.ubatch)
    params.n_seq_max = options.sequences
    params.n_outputs_max = options.sequences  # fewer than sequences is an abort at once
    params.kv_unified = not options.streams
    params.n_threads = options.threads or cores()
    params.n_threads_batch = options.threads_batch or options.threads or cores()
    params.type_k, params.type_v = KV_TYPES[options.kv_type_k], KV_TYPES[options.kv_type_v]
    params.flash_attn_type = flash_attention(options)
    params.swa_full = options.swa_full
    params.no_perf = True
    if options.rope.scaling is not None:
        params.rope_scaling_type = _ROPE[options.rope.scaling]
    params.rope_freq_base, params.rope_freq_scale = options.rope.freq_base, options.rope.freq_scale
    params.yarn_orig_ctx = options.rope.yarn_original_context
    return params


def flash_attention(options: EngineOptions) -> int:
    """Whether flash attention is used: llama.cpp's -1 leaves it to llama.cpp."""
    flash = False if options.reproducible else options.flash_attention
    return -1 if flash is None else int(flash)


def _lies_in_ram(options: EngineOptions) -> bool:
    return options.gpu_layers == 0 or not api.llama_supports_gpu_offload()


def _check_weights(path: Path, options: EngineOptions) -> None:
    """Raise MemoryNotEnough when weights that must lie in RAM pass what is free. Mapped ones may come and go."""
    if not _lies_in_ram(options) or (options.mmap and not options.mlock):
        return
    needed = sum(part.stat().st_size for name in split_parts(path.name) if (part := path.with_name(name)).is_file())
    free = psutil.virtual_memory().available
    if needed > free:
        raise MemoryNotEnough(f"{path.name} kept in memory", needed, free)


def _check_memory(model: LlamaModel, options: EngineOptions) -> None:
    """Raise MemoryNotEnough when the KV cache alone passes the memory that is free, where it lies in RAM."""
    if not _lies_in_ram(options):
        return
    heads, layers = api.llama_model_n_head_kv(model.pointer), api.llama_model_n_layer(model.pointer)
    size = int(model.meta(f"{model.architecture}.attention.key_length") or 0)
    size = size or api.llama_model_n_embd(model.pointer) // max(1, api.llama_model_n_head(model.pointer))
    cell = sum(KV_BYTES.get(kind, 0.5) for kind in (options.kv_type_k, options.kv_type_v))
    needed = int(layers * heads * size * cell * options.context)
    free = psutil.virtual_memory().available
    if needed > free:
        raise MemoryNotEnough(f"the KV cache of {model.path.name} for {options.context} tokens", needed, free)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _reason(lines: Sequence[str]) -> str:
    """The first line that says why, without the names of functions."""
    said = [re.sub(r"^(?:\w+: |error loading model: )+", "", line) for line in lines]
    telling = [line for line in said if not line.startswith("failed to load model") and line]
    return telling[0].rstrip() if telling else ""


def load_error(path: Path, lines: Sequence[str]) -> Exception:
    """Our error for a load that failed, from what llama.cpp wrote."""
    text = "\n".join(lines)
    if _ALLOCATION.search(text):
        found = _SIZE.search(text)
        scale = {"GiB": 2**30, "MiB": 2**20}.get(found[2] or "", 1) if found else 1
        needed = int(float(found[1]) * scale) if found else None
        return AllocationFailed(str(path), needed, psutil.virtual_memory().available)
    why = _reason(lines) or "llama.cpp refused it and gave no reason"
    unsupported = re.search(r"unknown model architecture.*|unsupported .*|requires flash|not supported.*", text)
    if unsupported:
        return ModelUnsupported(path, unsupported[0].strip())
    return ModelFileDamaged(path, why)

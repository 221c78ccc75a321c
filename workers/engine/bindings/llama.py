"""
The llama.cpp wrapper: a model and its context with loading, tokenising, decoding and sequences.

Input that would make llama.cpp abort the process is rejected before the call. Its error codes become Arriero's errors.
After each change of a sequence the positions in the cache are checked, because with sliding windows and recurrent
layers llama.cpp reports success when it did something else.

A context belongs to one thread. A model may be read by many threads.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import llama_cpp as api
import numpy as np
import numpy.typing as npt
import psutil

from app.catalog.source import split_parts
from app.kernel.errors import (
    MemoryNotEnough,
    ModelFileDamaged,
    ModelFileMissing,
    ModelFileUnusable,
    ModelUnsupported,
)
from workers.engine.bindings import gemm, native
from workers.engine.bindings.load_errors import load_error, reason_in
from workers.engine.bindings.timing import timed_decode
from workers.engine.bindings.token_batch import Batch
from workers.engine.chat.call_forms import TAGS
from workers.engine.options import KV_BYTES, KV_TYPES, EngineOptions
from workers.engine.threads import DecodeKind, DecodeThreads, kind_of

#: Logits of a decode, one row for each output.
Logits = npt.NDArray[np.float32]

#: Pooling types by llama.cpp's number, as the file's header spells it.
POOLING = {"1": "mean", "2": "cls", "3": "last", "4": "rank"}
_SPLIT = {"none": 0, "layer": 1, "row": 2, "tensor": 3}
_ROPE = {"none": 0, "linear": 1, "yarn": 2, "longrope": 3}
_TAGS = tuple(text.encode() for text in TAGS)


class LlamaModel:
    """The weights and the vocabulary of one file. Many threads may read it."""

    def __init__(self, path: Path, options: EngineOptions, on_progress: Callable[[float], None] | None = None) -> None:
        """
        Load the file. `on_progress` is called with the progress, from 0 to 1.

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
        with native.captured_log() as lines:
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
        #: False for encoder-only models. A decoder can write text only if its context has a memory.
        self.has_decoder: bool = api.llama_model_has_decoder(self.pointer)
        #: The pooling type in the file; None when it has none.
        self.pooling: str | None = POOLING.get(self.meta(f"{self.architecture}.pooling_type") or "")
        self.adds_bos: bool = api.llama_vocab_get_add_bos(self.vocab)
        self.bos: int = api.llama_vocab_bos(self.vocab)
        self.eos: int = api.llama_vocab_eos(self.vocab)
        kinds = [api.llama_vocab_get_attr(self.vocab, token) for token in range(self.n_vocab)]
        self.end_tokens = frozenset(token for token in range(self.n_vocab) if api.llama_vocab_is_eog(self.vocab, token))
        special = api.LLAMA_TOKEN_ATTR_CONTROL | api.LLAMA_TOKEN_ATTR_UNKNOWN
        self._pieces: dict[tuple[int, bool], bytes] = {}
        #: Control tokens. Texts cannot contain them.
        self.control_tokens = tuple(token for token, kind in enumerate(kinds) if kind & special)
        # In some families the tags around a tool call are control tokens. Models write them as text nevertheless.
        tags = [token for token in self.control_tokens if self.piece(token, special=True) in _TAGS]
        self._pieces |= {(token, False): self.piece(token, special=True) for token in tags}
        forbidden = [token for token in self.control_tokens if token not in self.end_tokens and token not in tags]
        self.forbidden_tokens = np.array(forbidden, np.intp)

    def know(self, *, shown: Collection[str] = (), allowed: Collection[str] = (), ends: Collection[str] = ()) -> None:
        """
        Make control tokens with these texts known, before any use of the model.

        Those that are `shown` are written as their text, those that are `allowed` also in texts with a grammar; those
        of `ends` end a text, also if the file does not say so.
        """
        spelled = {token: self.piece(token, special=True) for token in self.control_tokens}
        usual, final = {text.encode() for text in allowed}, {text.encode() for text in ends}
        visible = usual | {text.encode() for text in shown}
        self._pieces |= {(token, False): piece for token, piece in spelled.items() if piece in visible}
        self.end_tokens |= {token for token, piece in spelled.items() if piece in final}
        others = [
            token
            for token in self.forbidden_tokens.tolist()
            if token not in self.end_tokens and spelled[token] not in usual
        ]
        self.forbidden_tokens = np.array(others, np.intp)

    def close(self) -> None:
        """Free the model. Its contexts must be freed before."""
        if self.pointer:
            api.llama_model_free(self.pointer)
            self.pointer = None

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """
        Tokenise a text.

        `add_special` adds the tokens with which the model expects a prompt to begin, such as BOS. With `parse_special`
        control tokens that the text spells are parsed as such; otherwise they are plain text.
        """
        data = text.encode("utf-8", "replace")
        room = len(data) + 8
        buffer = (ctypes.c_int32 * room)()
        count = native.tokenize(self.vocab, data, len(data), buffer, room, add_special, parse_special)
        if count < 0:
            buffer = (ctypes.c_int32 * -count)()
            count = native.tokenize(self.vocab, data, len(data), buffer, -count, add_special, parse_special)
        return buffer[:count]

    def tokenize_pair(self, first: str, second: str) -> list[int]:
        """
        Tokenise two texts that are scored together, with the vocabulary's tokens before, between and after them.

        The same as in llama.cpp's server, with one exception: when the file has no token that ends a text, the
        separator also ends the second text, as BERT was trained: `[CLS] a [SEP] b [SEP]`.
        """
        vocab = self.vocab
        separator: int = api.llama_vocab_sep(vocab)
        end = self.eos if self.eos >= 0 else separator
        ends, parts = api.llama_vocab_get_add_eos(vocab), api.llama_vocab_get_add_sep(vocab)
        tokens = [self.bos] if self.adds_bos else []
        tokens += self.tokenize(first, add_special=False, parse_special=False)
        tokens += [end] * ends + [separator] * parts
        tokens += self.tokenize(second, add_special=False, parse_special=False)
        tokens += [end] * (ends or (parts and self.eos < 0))
        return [token for token in tokens if token >= 0]

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Return the bytes of a token; empty for a control token unless `special`."""
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
        """Return the Jinja source in the file, the default one or that of this name; None when there is none."""
        found = api.llama_model_chat_template(self.pointer, None if name is None else name.encode())
        return None if found is None else found.decode("utf-8", "replace")

    def meta(self, key: str) -> str | None:
        """Return a value of the file's header as text, or None."""
        buffer = ctypes.create_string_buffer(4096)
        count = api.llama_model_meta_val_str(self.pointer, key.encode(), buffer, len(buffer))
        return None if count < 0 else buffer.value.decode("utf-8", "replace")


class Context:
    """A llama.cpp context: a KV cache with its sequences, and decoding. It belongs to one thread."""

    def __init__(self, model: LlamaModel, options: EngineOptions) -> None:
        self.model, self.options = model, options
        self.pointer: Any = None
        _check_memory(model, options)
        params = context_params(options)
        with native.captured_log() as lines:
            self.pointer = api.llama_init_from_model(model.pointer, params)
            if not self.pointer:
                raise load_error(model.path, lines())
        self.memory: Any = api.llama_get_memory(self.pointer)
        self.n_context: int = api.llama_n_ctx(self.pointer)
        #: Most cells that one sequence may hold.
        self.n_sequence: int = min(self.n_context, api.llama_n_ctx_seq(self.pointer))
        self.n_batch: int = api.llama_n_batch(self.pointer)
        self._batch = Batch(self.n_batch, options.sequences)
        #: Texts and long prompts are computed faster one after the other than in one decode (see batch.APART_TOKENS).
        self.computes_apart = not options.streams and flash_attention(options) != 0 and _is_in_ram(options)
        #: Whether it can write text. Without a KV cache or a state it only embeds or ranks whole texts.
        self.writes_text = model.has_decoder and bool(self.memory)
        #: How many CPU threads compute a decode.
        self.threads = decode_threads(options)

    def close(self) -> None:
        """Free the context."""
        if self.pointer:
            api.llama_free(self.pointer)
            self.pointer = None

    def decode(self, pieces: Sequence[tuple[int, int, Sequence[int], int]]) -> int:
        """
        Decode pieces of (sequence, first position, tokens, how many of the last tokens produce logits).

        Returns llama.cpp's code: 0 success, 1 no free cells, 2 aborted, negative for an error.
        """
        sizes = [len(part) for _, _, part, _ in pieces]
        size = sum(sizes)
        if not 0 < size <= self.n_batch:
            raise AssertionError(f"a batch has {size} tokens; it must have from 1 to {self.n_batch}")
        batch = self._batch
        if size == len(pieces):  # a token each: the common case
            batch.put_singles(pieces)
        else:
            at = 0
            for sequence, first, part, outputs in pieces:
                batch.put(at, sequence, first, part)
                at += len(part)
                batch.outputs[at - outputs : at] = 1
        kind = kind_of(size, max(sizes))
        return timed_decode(self, kind, size, lambda: native.decode(self.pointer, batch.view(size)))

    def decode_image(
        self, sequence: int, first: int, rows: npt.NDArray[np.float32], grid: npt.NDArray[np.int32] | None, causal: bool
    ) -> int:
        """
        Decode embeddings of an image into a sequence, from position `first` on. They produce no logits.

        `grid` has the positions of each row relative to `first`, with M-RoPE. `causal` is false when the rows attend
        to each other in both directions. Returns what `decode` returns.
        """
        size = len(rows)
        limit = self.n_batch if causal else min(self.n_batch, api.llama_n_ubatch(self.pointer))
        if not 0 < size <= limit or rows.shape[1] != api.llama_model_n_embd_inp(self.model.pointer):
            raise AssertionError(f"{rows.shape} embeddings do not fit a decode of {limit}")
        values = np.ascontiguousarray(rows, np.float32)
        if grid is None:
            positions = np.arange(first, first + size, dtype=np.int32)
        else:
            positions = np.concatenate([*(grid + first), np.zeros(size, np.int32)]).astype(np.int32)
        self._batch.put(0, sequence, 0, [0] * size)
        batch = self._batch.image_view(size, values, positions)
        if causal:
            return timed_decode(self, DecodeKind.PROMPTS, size, lambda: native.decode(self.pointer, batch))
        api.llama_set_causal_attn(self.pointer, False)
        try:
            return timed_decode(self, DecodeKind.PROMPTS, size, lambda: native.decode(self.pointer, batch))
        finally:
            api.llama_set_causal_attn(self.pointer, True)

    def logits(self, rows: int) -> Logits:
        """Return the logits of the last decode, one row for each output in batch order. The array is writable."""
        return np.ctypeslib.as_array(native.logits(self.pointer), shape=(rows, self.model.n_vocab))

    def copy(self, source: int, target: int, count: int, last: int | None = None) -> bool:
        """
        Copy the positions before `count` of `source` to the empty sequence `target`.

        A text has as many positions as tokens. `last` is the highest position in the cache afterwards, where it is not
        the one before `count`, as after an image with M-RoPE.

        Returns False when that failed; `target` is then still empty.
        """
        if self.options.streams:
            native.seq_cp(self.memory, source, target, -1, -1)
            return self.truncate(target, count, last)
        native.seq_cp(self.memory, source, target, 0, count)
        return self._has_exactly(target, count, last) or self._drop_failed(target)

    def truncate(self, sequence: int, count: int, last: int | None = None) -> bool:
        """
        Truncate the sequence to the positions before `count`; `last` as for `copy`.

        Returns False when that failed; the sequence is then empty.
        """
        if count <= 0:
            return self.drop(sequence)
        removed = native.seq_rm(self.memory, sequence, count, -1)
        return (removed and self._has_exactly(sequence, count, last)) or self._drop_failed(sequence)

    def drop(self, sequence: int) -> bool:
        """Empty the sequence."""
        return bool(native.seq_rm(self.memory, sequence, -1, -1))

    def positions(self, sequence: int) -> tuple[int, int]:
        """Return the first and the last position of the sequence in the cache; -1 for none."""
        return native.pos_min(self.memory, sequence), native.pos_max(self.memory, sequence)

    def save(self, sequence: int) -> npt.NDArray[np.uint8]:
        """Copy the state of the sequence to host memory."""
        size = native.state_size(self.pointer, sequence)
        data = np.empty(size, np.uint8)
        written = native.state_get(self.pointer, data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)), size, sequence)
        return data[:written]

    def state_bytes(self, sequence: int) -> int:
        """Return the bytes that `save` would allocate."""
        return int(native.state_size(self.pointer, sequence))

    def restore(self, sequence: int, data: npt.NDArray[np.uint8], count: int, last: int | None = None) -> bool:
        """
        Load a state of `count` positions into an empty sequence; `last` as for `copy`.

        Returns False when that failed; it is then empty.
        """
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        read = native.state_set(self.pointer, pointer, len(data), sequence)
        return (read == len(data) and self._has_exactly(sequence, count, last)) or self._drop_failed(sequence)

    def clear(self) -> None:
        """Empty all sequences."""
        api.llama_memory_clear(self.memory, False)

    def use_loras(self, adapters: Sequence[tuple[Any, float]]) -> None:
        """Apply these adapters, with their scales, and no others, to all further decodes."""
        use_loras(self.pointer, adapters)

    def _has_exactly(self, sequence: int, count: int, expected: int | None) -> bool:
        first, last = self.positions(sequence)
        # With a sliding window only the positions are needed that the next token attends to.
        needed = max(0, count - self.model.window) if self.model.window else 0
        recurrent = self.model.recurrent
        return last == (count - 1 if expected is None else expected) and (recurrent or 0 <= first <= needed)

    def _drop_failed(self, sequence: int) -> bool:
        self.drop(sequence)
        return False


def check_file(path: Path) -> None:
    """
    Raises ModelFileMissing, ModelFileUnusable or ModelFileDamaged when the file is missing, unreadable or not GGUF.

    Only the first bytes are checked.
    """
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
    """Load the adapters of the options. Returns pointer and scale by name. Raises ModelUnsupported."""
    adapters = {}
    for lora in model.options.loras:
        check_file(lora.path)
        with native.captured_log() as lines:
            pointer = api.llama_adapter_lora_init(model.pointer, os.fsencode(lora.path))
            if not pointer:
                raise ModelUnsupported(lora.path, reason_in(lines()) or "it is not an adapter for this model")
        adapters[lora.name] = (pointer, lora.scale)
    return adapters


def use_loras(context: Any, adapters: Sequence[tuple[Any, float]]) -> None:
    """Apply these adapters and no others in a llama.cpp context. An adapter with scale 0 is left out."""
    used = [(pointer, scale) for pointer, scale in adapters if scale]
    pointers = (api.llama_adapter_lora_p_ctypes * max(1, len(used)))(*[pointer for pointer, _ in used])
    scales = (ctypes.c_float * max(1, len(used)))(*[scale for _, scale in used])
    api.llama_set_adapters_lora(context, pointers, len(used), scales)


def model_params(options: EngineOptions) -> Any:
    """Return llama.cpp's model parameters. The dry run uses the same. llama.cpp is to be started before."""
    params = api.llama_model_default_params()
    params.use_extra_bufts = not gemm.replace_repacking()
    params.n_gpu_layers = options.gpu_layers
    params.split_mode = _SPLIT[options.split_mode]
    params.main_gpu = options.main_gpu
    params.load_mode = (api.LLAMA_LOAD_MODE_MMAP if options.mmap else api.LLAMA_LOAD_MODE_NONE) | (
        api.LLAMA_LOAD_MODE_MLOCK if options.mlock else 0
    )
    return params


def context_params(options: EngineOptions) -> Any:
    """Return llama.cpp's context parameters. The dry run uses the same."""
    params = api.llama_context_default_params()
    params.n_ctx = options.context
    params.n_batch = options.batch
    params.n_ubatch = min(options.batch, options.ubatch)
    params.n_seq_max = options.sequences
    params.n_outputs_max = options.outputs
    params.kv_unified = not options.streams
    params.n_threads, params.n_threads_batch = thread_counts(options)
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
    """Return llama.cpp's value for flash attention: 0 off, 1 on, -1 llama.cpp decides."""
    flash = False if options.reproducible else options.flash_attention
    return -1 if flash is None else int(flash)


def truncation_problem(model: LlamaModel, options: EngineOptions) -> str | None:
    """Return why a sequence cannot be truncated anywhere; None when it can."""
    if model.recurrent:
        return "it is recurrent"
    return "swa_full is off" if model.window and not options.swa_full else None


def _is_in_ram(options: EngineOptions) -> bool:
    return options.gpu_layers == 0 or not api.llama_supports_gpu_offload()


def _check_weights(path: Path, options: EngineOptions) -> None:
    """Raises MemoryNotEnough when weights that cannot be paged out exceed the free RAM."""
    if not _is_in_ram(options) or (options.mmap and not options.mlock):
        return
    needed = sum(part.stat().st_size for name in split_parts(path.name) if (part := path.with_name(name)).is_file())
    free = psutil.virtual_memory().available
    if needed > free:
        raise MemoryNotEnough(f"{path.name} kept in memory", needed, free)


def _check_memory(model: LlamaModel, options: EngineOptions) -> None:
    """Raises MemoryNotEnough when the KV cache is in RAM and alone exceeds the free memory."""
    if not _is_in_ram(options):
        return
    heads, layers = api.llama_model_n_head_kv(model.pointer), api.llama_model_n_layer(model.pointer)
    size = int(model.meta(f"{model.architecture}.attention.key_length") or 0)
    size = size or api.llama_model_n_embd(model.pointer) // max(1, api.llama_model_n_head(model.pointer))
    cell = sum(KV_BYTES.get(kind, 0.5) for kind in (options.kv_type_k, options.kv_type_v))
    needed = int(layers * heads * size * cell * options.context)
    free = psutil.virtual_memory().available
    if needed > free:
        raise MemoryNotEnough(f"the KV cache of {model.path.name} for {options.context} tokens", needed, free)


def thread_counts(options: EngineOptions) -> tuple[int, int]:
    """Return the largest numbers of CPU threads for texts, and for prompts, images and vectors."""
    texts = options.threads or options.most_threads or cores()
    return texts, options.threads_batch or texts


def decode_threads(options: EngineOptions) -> DecodeThreads:
    """Return the choice of threads. It is measured where the CPU computes, but for the reproducible mode."""
    return DecodeThreads(
        options.most_threads or cores(),
        texts=options.threads,
        prompts=options.threads_batch or options.threads,
        is_measured=_is_in_ram(options) and not options.reproducible,
    )


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

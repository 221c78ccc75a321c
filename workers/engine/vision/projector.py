"""
The projector: llama.cpp's multimodal library (libmtmd), which turns images into embeddings for the text model.

Preparing an image (scaling, cutting into slices, counting its cells) is safe from any thread. Encoding belongs to one.
Images come as pixels that were decoded and checked before; the library's own decoders are not used.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import finalize

import llama_cpp as api
import numpy as np

from app.inference.requests import Pixels
from app.kernel.errors import AllocationFailed, FailureReason, ModelUnsupported, StepFailure
from workers.engine.bindings import native
from workers.engine.bindings.llama import LlamaModel, check_file, flash_attention, thread_counts
from workers.engine.bindings.load_errors import load_error
from workers.engine.options import EngineOptions
from workers.engine.vision.image_spans import Embeddings, ImageChunk

#: Prepared images that are kept, so that counting a prompt and computing it prepare an image once.
_KEPT = 8
#: Side in pixels of the image that is prepared at the load, to see whether the vocabulary has what it needs.
_TRIED_SIDE = 64
_TEXT, _IMAGE = 0, 1


class _Chunks:
    """The chunks of one image in the library's memory, and the memory of those that were copied out of them."""

    def __init__(self, library: Any, pointer: Any) -> None:
        self.pointer = library.mtmd_input_chunk_copy(pointer)
        finalize(self, library.mtmd_input_chunk_free, self.pointer)


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """An image in the form in which it enters a prompt: text tokens, and chunks that are encoded."""

    parts: tuple[tuple[int, ...] | ImageChunk, ...]

    @property
    def cells(self) -> int:
        """Cells of the KV cache."""
        return sum(part.cells if isinstance(part, ImageChunk) else len(part) for part in self.parts)


def load_library() -> Any:
    """Return the bindings of libmtmd. Raises ImportError where llama.cpp was built without it."""
    try:
        from llama_cpp import mtmd_cpp  # it loads the library, which few pools need
    except (OSError, RuntimeError, FileNotFoundError) as error:
        raise ImportError(
            "llama.cpp was built here without its library for images (libmtmd); build it again with "
            "-DLLAVA_BUILD=ON: docs/vision.md"
        ) from error
    return mtmd_cpp


class Projector:
    """One projector, loaded for a text model."""

    def __init__(self, path: Path, model: LlamaModel, options: EngineOptions) -> None:
        """
        Load the file.

        Raises ModelFileMissing, ModelFileDamaged, AllocationFailed, and ModelUnsupported when it does not belong to the
        model, or llama.cpp was built without the library.
        """
        check_file(path)
        self.path, self._model = path, model
        try:
            self._library = library = load_library()
        except ImportError as error:
            raise ModelUnsupported(path, str(error)) from error
        native.start()
        library.mtmd_log_set(native.log_callback(), None)
        params = library.mtmd_context_params_default()
        params.use_gpu = options.gpu_layers != 0 and api.llama_supports_gpu_offload()
        params.n_threads = thread_counts(options)[1]
        params.print_timings, params.warmup = False, True
        params.flash_attn_type = flash_attention(options)
        if options.image_tokens is not None:
            params.image_max_tokens = options.image_tokens
        self.pointer: Any = None
        with native.captured_log() as lines:
            self.pointer = library.mtmd_init_from_file(os.fsencode(path), model.pointer, params)
            if not self.pointer:
                error_of = load_error(path, lines())
                if isinstance(error_of, AllocationFailed):
                    raise error_of
                raise ModelUnsupported(path, f"it is no projector for {model.path.name}: {'; '.join(lines()[:2])}")
        self._prepared: OrderedDict[str, PreparedImage] = OrderedDict()
        self._lock = threading.Lock()
        self.n_embd: int = api.llama_model_n_embd_inp(model.pointer)
        try:
            self._check(options)
        except BaseException:
            self.close()
            raise

    def _check(self, options: EngineOptions) -> None:
        """Raises ModelUnsupported when images cannot be given to this model in this configuration."""
        library = self._library
        if not library.mtmd_support_vision(self.pointer):
            raise ModelUnsupported(self.path, "it is a projector for sound only; images are supported here")
        self.uses_grid: bool = library.mtmd_decode_use_mrope(self.pointer)
        self.non_causal: bool = library.mtmd_decode_use_non_causal(self.pointer, None)
        gray = Pixels(_TRIED_SIDE, _TRIED_SIDE, bytes([127]) * (3 * _TRIED_SIDE**2))
        try:
            tried = self.prepare(gray)
        except StepFailure as failure:
            raise ModelUnsupported(self.path, failure.message) from failure
        largest = max((part.cells for part in tried.parts if isinstance(part, ImageChunk)), default=0)
        if self.non_causal and largest > min(options.batch, options.ubatch):
            message = (
                f"an image of this model has {largest} cells that are computed together; set batch and ubatch in "
                f"[models.engine] to at least {largest}"
            )
            raise ModelUnsupported(self.path, message)

    def close(self) -> None:
        """Free the projector."""
        with self._lock:
            self._prepared.clear()
        if self.pointer:
            self._library.mtmd_free(self.pointer)
            self.pointer = None

    def prepare(self, image: Pixels) -> PreparedImage:
        """Scale an image, cut it into chunks and count its cells. Raises StepFailure when that fails."""
        digest = image.digest()
        with self._lock:
            if (known := self._prepared.get(digest)) is not None:
                self._prepared.move_to_end(digest)
                return known
        made = PreparedImage(tuple(self._parts(image, digest)))
        with self._lock:
            self._prepared[digest] = made
            while len(self._prepared) > _KEPT:
                self._prepared.popitem(last=False)
        return made

    def encode(self, chunk: ImageChunk) -> Embeddings:
        """Return the embeddings of a chunk. Belongs to one thread. Raises StepFailure when that fails."""
        library = self._library
        with native.captured_log() as lines:
            code = library.mtmd_encode_chunk(self.pointer, chunk.handle.pointer)
            if code:
                reason = "; ".join(lines()[:1]) or f"llama.cpp returned {code}"
                raise StepFailure(FailureReason.ENGINE_ERROR, f"the image could not be encoded: {reason}")
        output = library.mtmd_get_output_embd(self.pointer)
        found = np.ctypeslib.as_array(output, shape=(chunk.cells, self.n_embd)).copy()
        if not np.isfinite(found).all():
            raise StepFailure(FailureReason.ENGINE_ERROR, "the encoded image contains numbers that are not finite")
        return found

    def _parts(self, image: Pixels, digest: str) -> Iterator[tuple[int, ...] | ImageChunk]:
        library, number = self._library, 0
        with self._tokenized(image) as chunks:
            for at in range(library.mtmd_input_chunks_size(chunks)):
                chunk = library.mtmd_input_chunks_get(chunks, at)
                kind = library.mtmd_input_chunk_get_type(chunk)
                if kind == _TEXT:
                    yield self._text_tokens(chunk)
                elif kind == _IMAGE:
                    yield self._image_chunk(chunk, f"{digest}/{number}")
                    number += 1
                else:
                    raise StepFailure(FailureReason.ENGINE_ERROR, "llama.cpp made sound of an image")

    @contextmanager
    def _tokenized(self, image: Pixels) -> Iterator[Any]:
        library = self._library
        pixels = (ctypes.c_uint8 * len(image.data)).from_buffer_copy(image.data)
        bitmap = library.mtmd_bitmap_init(image.width, image.height, pixels)
        chunks = library.mtmd_input_chunks_init()
        try:
            marker = library.mtmd_get_marker(self.pointer)
            text = library.mtmd_input_text(text=marker, text_len=len(marker), add_special=False, parse_special=True)
            bitmaps = (library.mtmd_bitmap_p_ctypes * 1)(bitmap)
            with native.captured_log() as lines:
                code = library.mtmd_tokenize(self.pointer, chunks, ctypes.byref(text), bitmaps, 1)
                if code:
                    reason = "; ".join(lines()[:1]) or f"llama.cpp returned {code}"
                    message = f"an image of {image.width} by {image.height} pixels cannot be prepared: {reason}"
                    raise StepFailure(FailureReason.INVALID_REQUEST, message)
            yield chunks
        finally:
            library.mtmd_input_chunks_free(chunks)
            library.mtmd_bitmap_free(bitmap)

    def _text_tokens(self, chunk: Any) -> tuple[int, ...]:
        count = ctypes.c_size_t()
        tokens = self._library.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
        found = tuple(tokens[: count.value])
        if any(not 0 <= token < self._model.n_vocab for token in found):
            message = (
                f"the vocabulary of {self._model.path.name} lacks the tokens that {self.path.name} puts around images"
            )
            raise StepFailure(FailureReason.ENGINE_ERROR, message)
        return found

    def _image_chunk(self, chunk: Any, key: str) -> ImageChunk:
        library = self._library
        cells = int(library.mtmd_input_chunk_get_n_tokens(chunk))
        positions = int(library.mtmd_input_chunk_get_n_pos(chunk))
        tokens = library.mtmd_input_chunk_get_tokens_image(chunk)
        grid = None
        if self.uses_grid:
            get: Callable[..., Any] = library.mtmd_image_tokens_get_decoder_pos
            found = [get(tokens, 0, cell) for cell in range(cells)]
            # llama.cpp's order of the dimensions: time, row, column, unused.
            grid = np.array([[at.t for at in found], [at.y for at in found], [at.x for at in found]], np.int32)
        elif positions != cells:
            message = f"{self.path.name} places images in a way that is not supported here"
            raise StepFailure(FailureReason.ENGINE_ERROR, message)
        handle = _Chunks(library, chunk)
        return ImageChunk(key, cells, positions, grid, self.non_causal, handle)


__all__ = ["PreparedImage", "Projector", "load_library"]

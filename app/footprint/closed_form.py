"""
The closed form: a footprint computed from the header of a model file alone.

Weights and caches equal llama.cpp's own numbers to the byte. The compute buffers follow from a formula that was fitted
to its dry runs, and the memory of the process from measurements of such processes.

Nothing here opens a file or calls llama.cpp.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from app.catalog.engine_options import UNQUANTISED_KV
from app.catalog.metadata import Header, Tensor
from app.footprint import caches
from app.footprint.caches import CacheCells, Layer
from app.footprint.configuration import LoadConfiguration, draft_context
from app.footprint.footprint import HOST, MIB, Footprint, FootprintSource, Share, closed_form_margin

#: Bytes of RAM that a tokenizer uses for each token of its vocabulary: with merges (BPE), and otherwise.
_BPE_TOKEN_BYTES, _TOKEN_BYTES = 400, 220
#: Architectures whose closed form was compared with llama.cpp's dry runs (benchmarks/footprint.py).
_VERIFIED = frozenset(
    {"bert", "cohere2", "deepseek2", "gemma2", "gemma3", "gpt-oss", "granitehybrid", "lfm2", "llama", "mamba2",
     "nomic-bert", "olmoe", "phi3", "qwen2", "qwen3", "qwen3moe", "qwen3next", "starcoder2"}
)  # fmt: skip
#: Maximum texts that are embedded in one batch.
_EMBEDDED_TEXTS = 64
#: Bytes of a token's position and of the indices of its cells.
_TOKEN_INDEX_BYTES = 40
#: Name prefixes of the input tensors, which stay in host memory.
_INPUT_TENSORS = ("token_embd.", "position_embd.", "token_types.", "per_layer_token_embd.")


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """The memory that a pool process uses in addition to its model: defaults until it was measured on the host."""

    #: Bytes of RAM of a pool process before it loads a model, its tokenizer not counted.
    base: int = 160 * MIB
    #: Bytes that the driver's context of each process uses on a GPU.
    context: int = 600 * MIB


#: Projectors whose images have as many cells as their size asks for, and llama.cpp's limit of these.
_SIZED_PROJECTORS = frozenset({"qwen2vl_merger", "qwen2.5vl_merger", "qwen3vl_merger", "ling3vl", "pixtral", "kimivl"})
_IMAGE_TOKENS = 4096

#: Used until the process memory was measured on a host.
DEFAULT_PROCESS = ProcessMemory()


def closed_form(
    header: Header,
    configuration: LoadConfiguration,
    *,
    gpus: int = 0,
    free: Sequence[int] = (),
    process: ProcessMemory = DEFAULT_PROCESS,
    adapters: Sequence[Header] = (),
    projector: Header | None = None,
    draft: Header | None = None,
) -> Footprint:
    """
    Computes the footprint from the header, for this number of GPUs.

    `free` are the free bytes of each GPU: without a `tensor_split`, llama.cpp splits in proportion to them.
    `adapters` are LoRA files; `projector` is the file for images or audio (mmproj), `draft`
    that of the draft model, which is loaded in addition, on the same devices.
    The margin is larger for an architecture that was not compared with llama.cpp's own figures, and with a projector.
    """
    placement = _Placement(header, configuration, gpus, free)
    shares = []
    for place in (HOST, *range(gpus)):
        weights = placement.weights(place) + sum(_adapter_bytes(adapter, placement, place) for adapter in adapters)
        compute = placement.compute(place)
        if projector is not None and place == (0 if gpus else HOST):
            weights += projector.tensor_bytes
            compute += _projector_compute(projector, configuration.image_tokens)
        shares.append(
            Share(
                place,
                weights=weights,
                cache=placement.cache(place),
                compute=compute,
                output=placement.output() if place == HOST else 0,
                process=process_bytes(header, configuration, place, gpus=gpus, process=process)
                + (0 if draft is None else draft_process_bytes(draft, configuration, place, gpus=gpus)),
                parked=configuration.parked if place == HOST and placement.has_cache else 0,
            )
        )
    if draft is not None:
        second = _Placement(draft, draft_context(configuration), gpus, free)
        shares = [_with_draft(share, second) for share in shares]
    verified = (
        all(one.architecture in _VERIFIED for one in (header, draft) if one is not None)
        and projector is None
        and (gpus < 2 or configuration.split_mode not in {"row", "tensor"})
    )
    margins = {share.place: closed_form_margin(share, verified=verified) for share in shares}
    notes = [] if header.architecture in _VERIFIED else [f"the architecture {header.architecture} is not verified"]
    if not caches.is_complete(header):
        notes.append(f"{header.architecture} also keeps keys for an indexer, which are not counted")
    # llama.cpp reads a projector into memory of the process; only the model's file is mapped.
    copied = projector.tensor_bytes if projector is not None and not gpus else 0
    return Footprint(FootprintSource.CLOSED_FORM, tuple(shares), margins, tuple(notes), copied=copied)


def _with_draft(share: Share, placement: _Placement) -> Share:
    """Returns the share with the weights, the cache and the buffers of the draft model."""
    return replace(
        share,
        weights=share.weights + placement.weights(share.place),
        cache=share.cache + placement.cache(share.place),
        compute=share.compute + placement.compute(share.place),
        output=share.output + (placement.output() if share.place == HOST else 0),
    )


def draft_process_bytes(draft: Header, configuration: LoadConfiguration, place: int, *, gpus: int) -> int:
    """Returns the memory that the draft model adds to the process and that llama.cpp does not report."""
    own = draft_context(configuration)
    if place != HOST:
        return working_memory(draft, own, place, gpus=gpus)
    return process_bytes(draft, own, place, gpus=gpus, process=ProcessMemory(base=0))


def process_bytes(
    header: Header, configuration: LoadConfiguration, place: int, *, gpus: int, process: ProcessMemory = DEFAULT_PROCESS
) -> int:
    """
    Returns the memory of the process that llama.cpp does not report.

    On a GPU this is the driver's context, on the host the interpreter, the tokenizer and llama.cpp's records of cells;
    on both also the working memory.
    """
    if place != HOST:
        return process.context + working_memory(header, configuration, place, gpus=gpus)
    tokenizer = (_BPE_TOKEN_BYTES if header.tokenizer == "gpt2" else _TOKEN_BYTES) * (header.vocabulary or 0)
    notes = caches.cell_records(header, configuration)
    return process.base + tokenizer + notes + working_memory(header, configuration, place, gpus=gpus)


def working_memory(header: Header, configuration: LoadConfiguration, place: int, *, gpus: int) -> int:
    """
    Returns the bytes that are used during a computation and that llama.cpp does not report.

    CPU kernels convert their inputs. On a GPU, the cache of one layer is also stored as 16-bit numbers if it is
    quantised (llama.cpp#23446).
    """
    layers, heads = caches.layers(header), max(header.heads, default=0)
    cells = caches.cells(header, configuration)
    if place != HOST:
        quantised = {configuration.kv_type_k, configuration.kv_type_v} - UNQUANTISED_KV
        widest = max((layer.key + layer.value for layer in layers), default=0)
        return 2 * widest * cells.each * cells.streams if quantised and configuration.flash else 0
    if gpus and configuration.gpu_layers < 0:
        return 0
    tokens = max(min(configuration.batch, configuration.ubatch), configuration.embedding)
    widest = max(_feed_forward(header)[0], header.embedding_length or 0, heads * (header.key_length or 0))
    matrix = 0 if configuration.flash else heads * (cells.each if caches.cache_kinds(layers) else tokens)
    return 2 * tokens * (widest + matrix)


class _Placement:
    """The placement of tensors, caches and buffers by llama.cpp: `llama_model_base::load_tensors` and its scheduler."""

    def __init__(self, header: Header, configuration: LoadConfiguration, gpus: int, free: Sequence[int] = ()) -> None:
        self._header, self._configuration, self._gpus = header, configuration, gpus
        self._layers = caches.layers(header)
        self._cells = caches.cells(header, configuration)
        self._widest = max((layer.value for layer in self._layers), default=0)
        self._all = header.layers or 0
        #: Cumulative share of each GPU, from 0 to 1.
        split: Sequence[float] = configuration.tensor_split or (free if any(free) else (1.0,) * gpus)
        ends: list[float] = list(itertools.accumulate([*split, *(0.0,) * gpus][:gpus]))
        self._ends = [end / ends[-1] for end in ends] if ends else []
        wanted = self._all + 1 if configuration.gpu_layers < 0 else configuration.gpu_layers
        self._offloaded = min(wanted, self._all + 1) if gpus else 0
        self._first = max(self._all + 1 - wanted, 0)

    @property
    def has_cache(self) -> bool:
        """Whether the model has a cache or a state, which can be parked."""
        return any(layer.key or layer.state for layer in self._layers)

    def place_of(self, layer: int) -> int:
        """Returns the place of a layer; the output counts as the layer after the last."""
        if not self._offloaded or not 0 <= layer - self._first < self._offloaded:
            return HOST
        if self._configuration.split_mode == "none":
            return self._configuration.main_gpu
        return bisect_right(self._ends, (layer - self._first) / self._offloaded)

    def weights(self, place: int) -> int:
        """Returns the bytes of the weights at that place, with the padding of the device's buffers."""
        padding, total = 32 if place == HOST else 128, 0
        output, tied = self.place_of(self._all), True
        mode = self._configuration.split_mode
        for tensor in self._header.tensors:
            size = -(-tensor.size // padding) * padding
            if tensor.name == "output.weight":
                tied = False
            if (layer := _layer_of(tensor)) is not None:
                own = self.place_of(layer)
            elif tensor.name.startswith(_INPUT_TENSORS):
                own = HOST
            else:
                own = output
            divided = len(tensor.shape) > 1 and (mode == "row" or layer is not None or tensor.name == "output.weight")
            if mode in {"row", "tensor"} and divided and own != HOST and place != HOST:
                total += round(size * self._gpu_share(place))
            elif self._is_at(own, place):
                total += size
        embeddings = next((tensor for tensor in self._header.tensors if tensor.name == "token_embd.weight"), None)
        # Embeddings that are also the output are stored once more on a GPU.
        if tied and embeddings is not None and output != HOST and self._is_at(output, place) and self._has_output():
            total += -(-embeddings.size // padding) * padding
        return total

    def cache(self, place: int) -> int:
        """Returns the bytes of the caches and states at that place, including those of the embedding context."""
        contexts = [(self._configuration, self._cells)]
        if (embedding := self._embedding()) is not None:
            contexts.append((embedding, caches.cells(self._header, embedding)))
        # With the mode `tensor` each GPU keeps its heads of every layer.
        part = self._gpu_share(place) if self._configuration.split_mode == "tensor" and place != HOST else 1
        total = sum(
            caches.layer_bytes(layer, configuration, cells, widest_value=self._widest)
            for configuration, cells in contexts
            for number, layer in enumerate(self._layers)
            if self._is_at(self.place_of(number), place)
        )
        return round(total * part)

    def compute(self, place: int) -> int:
        """Returns the bytes of the compute buffers at that place."""
        contexts = [(self._configuration, self._cells, False)]
        if (embedding := self._embedding()) is not None:
            contexts.append((embedding, caches.cells(self._header, embedding), True))
        computes = any(self._is_at(self.place_of(layer), place) for layer in range(self._all + 1))
        layered = self._configuration.split_mode == "layer"
        copies = 4 if self._gpus > 1 and self._offloaded > self._all and layered else 1  # pipeline parallelism
        total = 0
        for configuration, cells, embeddings in contexts:
            tokens = min(configuration.batch, configuration.ubatch, cells.each * cells.streams)
            inputs = _masks(self._layers, cells, tokens, configuration) + 4 * tokens * (
                self._header.embedding_length or 0
            )
            if computes:
                total += _compute(self._header, self._layers, configuration, cells, tokens, embeddings=embeddings)
                total += (copies - 1) * inputs
            elif place == HOST:  # the inputs, and the embeddings of the tokens
                total += copies * inputs + 4 * tokens * (self._header.embedding_length or 0)
        return total

    def output(self) -> int:
        """Returns the bytes of host memory for outputs: logits per sequence, embeddings and logits per token."""
        vocabulary, width = self._header.vocabulary or 0, self._header.embedding_length or 0
        total = 4 * (self._configuration.sequences + self._configuration.drafts) * vocabulary
        if (embedding := self._embedding()) is not None:
            # First for each text, then for each token; the allocator keeps the first allocation.
            total += 4 * (embedding.context + _EMBEDDED_TEXTS) * (vocabulary + width)
        return total

    def _embedding(self) -> LoadConfiguration | None:
        """Returns the configuration of the embedding context."""
        return embedding_context(self._header, self._configuration)

    def _has_output(self) -> bool:
        """Returns whether the model has an output."""
        return any(tensor.name.startswith("output") for tensor in self._header.tensors) or bool(
            caches.cache_kinds(self._layers)
        )

    def _is_at(self, own: int, place: int) -> bool:
        """Returns whether what belongs to the place `own` is at `place`: with the mode `tensor`, on every GPU."""
        return own == place or (self._configuration.split_mode == "tensor" and HOST not in {own, place})

    def _gpu_share(self, place: int) -> float:
        return self._ends[place] - (self._ends[place - 1] if place else 0)


def embedding_context(header: Header, configuration: LoadConfiguration) -> LoadConfiguration | None:
    """
    Returns the configuration of the embedding context, or None without one.

    It computes each text in one pass, and up to 64 texts in one batch.
    """
    if not configuration.embedding:
        return None
    size = min(configuration.embedding, header.context_length or configuration.embedding)
    return replace(
        configuration, sequences=_EMBEDDED_TEXTS, context=size, batch=size, ubatch=size, streams=False, kv_type_k="f16",
        kv_type_v="f16", swa_full=True, embedding=0, drafts=0,
    )  # fmt: skip


def _masks(layers: tuple[Layer, ...], cells: CacheCells, tokens: int, configuration: LoadConfiguration) -> int:
    """Returns the bytes of the attention masks."""
    size = 2 if configuration.flash else 4
    if not (found := caches.cache_kinds(layers)):
        return size * tokens * tokens
    return sum(size * tokens * (cells.window if windowed else cells.each) for windowed in found)


def _compute(
    header: Header,
    layers: tuple[Layer, ...],
    configuration: LoadConfiguration,
    cells: CacheCells,
    tokens: int,
    *,
    embeddings: bool,
) -> int:
    """
    Returns the bytes of the compute buffer for one micro-batch: the maximum of what is needed at the same time.

    Candidates, for each token: the feed-forward network with its gate, the results of the experts, the attention, the
    projections of a recurrent layer, and the logits. The factors were fitted to llama.cpp's dry runs of 20 shapes.
    """
    width, heads = header.embedding_length or 0, max(header.heads, default=0)
    query = heads * (header.key_length or 0)
    pair = max((layer.key + layer.value for layer in layers), default=0)
    feed, gated = _feed_forward(header)
    states = max((layer.state for layer in layers), default=0)
    masks = _masks(layers, cells, tokens, configuration)

    streams = [(3 if gated else 1) * feed + 3 * width + max(width, query)]
    if used := header.experts_used:
        inner = _number(header, "expert_feed_forward_length") or feed // used
        streams.append(2 * used * width + used * inner + 3 * width)
    attention = 3 * width + 3 * max(width, query) + pair
    found = [masks + tokens * (4 * max(*streams, attention) + _TOKEN_INDEX_BYTES)]
    if not configuration.flash and heads:
        # The complete attention matrix: each head, each token, each cell.
        attended = cells.each if caches.cache_kinds(layers) else tokens
        found.append(masks + tokens * (4 * (3 * width + 3 * query + pair + heads * attended) + _TOKEN_INDEX_BYTES))
    if states:
        inner, state = _number(header, "ssm.inner_size"), _number(header, "ssm.state_size")
        projected = 2 * inner + 2 * _number(header, "ssm.group_count") * state + _number(header, "ssm.time_step_rank")
        each = 4 * (3.3 * (projected or 3 * width) + width)
        found.append(round(masks + tokens * each + 1.03 * states * configuration.sequences))
    vocabulary = header.vocabulary or 0
    if embeddings:
        found.append(
            4 * tokens * (vocabulary + 3 * width + _EMBEDDED_TEXTS) + masks
            if caches.cache_kinds(layers) or states
            else 0
        )
    else:
        outputs = min(tokens, configuration.sequences + configuration.drafts)
        found.append(4 * (outputs * (vocabulary + width) + tokens * width))
    return max(found)


def _feed_forward(header: Header) -> tuple[int, bool]:
    """Returns the width of the feed-forward network, of all active experts together, and whether it has a gate."""
    given = header.metadata.get(f"{header.architecture}.feed_forward_length")
    dense = max(given, default=0) if isinstance(given, tuple) else given if isinstance(given, int) else 0
    names = {tensor.name.split(".", 2)[-1]: tensor for tensor in header.tensors if tensor.name.startswith("blk.")}
    up = names.get("ffn_up.weight")
    fused = up is not None and len(up.shape) > 1 and up.shape[1] >= 2 * dense > 0
    gated = fused or any(name.startswith(("ffn_gate.", "ffn_gate_exps.", "ffn_gate_up_exps.")) for name in names)
    if not header.experts:
        return dense, gated
    used = (header.experts_used or 1) * (_number(header, "expert_feed_forward_length") or dense)
    return max(used, dense if up is not None else 0), gated


def _adapter_bytes(adapter: Header, placement: _Placement, place: int) -> int:
    """Returns the bytes of an adapter at that place: each tensor is stored with the layer that it changes."""
    total = 0
    for tensor in adapter.tensors:
        layer = _layer_of(tensor)
        total += tensor.size if placement.place_of(-1 if layer is None else layer) == place else 0
    return total


def _layer_of(tensor: Tensor) -> int | None:
    """Returns the layer of a tensor, or None."""
    block, _, rest = tensor.name.partition(".")
    number = rest.partition(".")[0]
    return int(number) if block == "blk" and number.isdigit() else None


def _projector_compute(projector: Header, image_tokens: int = 0) -> int:
    """
    Returns the bytes for processing an image: its patches in the widest layer, and their attention.

    A projector that follows the size of the image has `image_tokens` cells at most, each of several patches. Its
    attention is computed without the matrix of all pairs.
    """
    size, patch = (_number(projector, f"vision.{name}") for name in ("image_size", "patch_size"))
    patches = (size // patch) ** 2 if patch else 1500  # half a minute of audio
    kind = "vision" if patch else "audio"
    width, feed, heads = (
        _number(projector, f"{kind}.{name}")
        for name in ("embedding_length", "feed_forward_length", "attention.head_count")
    )
    pixels = 3 * patch**2
    if projector.metadata.get(f"{projector.architecture}.projector_type") in _SIZED_PROJECTORS:
        merged = _number(projector, "vision.spatial_merge_size") or 2
        patches = max(patches, (image_tokens or _IMAGE_TOKENS) * merged**2)
        return 4 * patches * (6 * width + 2 * feed + pixels)
    return 4 * patches * (6 * width + 2 * feed + pixels + heads * patches)


def _number(header: Header, name: str) -> int:
    """Returns a number of the architecture; 0 when it is absent from the file."""
    value = header.metadata.get(f"{header.architecture}.{name}")
    return value if isinstance(value, int) and not isinstance(value, bool) else 0

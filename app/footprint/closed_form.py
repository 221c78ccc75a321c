"""
The reckoning of a footprint from the header of a model's file: the closed form.

Weights and caches are counted as llama.cpp counts them, to the byte. The buffers in which it computes follow from a
formula that was fitted to its own dry runs, and what the process around it takes, from what was measured of such.

Nothing here opens a file or asks llama.cpp.
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
from app.footprint.configuration import LoadConfiguration
from app.footprint.footprint import HOST, MIB, Footprint, FootprintSource, Share, margin_of_reckoning

#: Bytes of RAM that a tokenizer takes for each token of its vocabulary: by merges, and otherwise.
_MERGED_TOKEN, _TOKEN = 400, 220
#: Architectures for which all of it was compared with llama.cpp's dry runs (benchmarks/footprint.py).
_PROVEN = frozenset(
    {"bert", "cohere2", "deepseek2", "gemma2", "gemma3", "gpt-oss", "granitehybrid", "lfm2", "llama", "mamba2",
     "nomic-bert", "olmoe", "phi3", "qwen2", "qwen3", "qwen3moe", "qwen3next", "starcoder2"}
)  # fmt: skip
#: Texts that are embedded side by side.
_TEXTS = 64
#: Bytes of a token's position and of the places of its cells.
_INDICES = 40
#: Tensors by which texts come in; they stay with the host.
_INPUTS = ("token_embd.", "position_embd.", "token_types.", "per_layer_token_embd.")
#: Types whose matrices the processor keeps in another order; an embedding that is the output too is then there twice.
_REPACKED = frozenset({"Q2_K", "Q4_0", "Q4_K", "IQ4_NL", "MXFP4"})


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """What the processes of a host take besides models: guesses until something was measured there."""

    #: Bytes of RAM of a pool process before it loads a model, its tokenizer not counted.
    base: int = 160 * MIB
    #: Bytes of a GPU that the driver's context takes in each process.
    context: int = 600 * MIB


#: Before anything was measured on a host.
GUESS = ProcessMemory()


def closed_form(
    header: Header,
    configuration: LoadConfiguration,
    *,
    gpus: int = 0,
    free: Sequence[int] = (),
    process: ProcessMemory = GUESS,
    adapters: Sequence[Header] = (),
    projector: Header | None = None,
) -> Footprint:
    """
    The footprint by the header, on so many GPUs.

    `free` are the bytes that are free on each: where the configuration gives no shares, llama.cpp splits by them.
    `adapters` are LoRA files; `projector` is the file through which the model sees or hears (mmproj).
    Where the architecture was never compared with llama.cpp's own figures, or it sees or hears, more is added.
    """
    placed = _Placed(header, configuration, gpus, free)
    shares = []
    for place in (HOST, *range(gpus)):
        weights = placed.weights(place) + sum(_near(adapter, placed, place) for adapter in adapters)
        compute = placed.compute(place)
        if projector is not None and place == (0 if gpus else HOST):
            weights += projector.tensor_bytes
            compute += _projector_compute(projector)
        shares.append(
            Share(
                place,
                weights=weights,
                cache=placed.cache(place),
                compute=compute,
                output=placed.output() if place == HOST else 0,
                process=besides(header, configuration, place, gpus=gpus, process=process),
                parked=configuration.parked if place == HOST and placed.keeps else 0,
            )
        )
    proven = header.architecture in _PROVEN and projector is None and (gpus < 2 or configuration.split_mode != "row")
    margins = {share.place: margin_of_reckoning(share, proven=proven) for share in shares}
    notes = [] if header.architecture in _PROVEN else [f"the architecture {header.architecture} is not proven"]
    if not caches.counts_all(header):
        notes.append(f"{header.architecture} keeps keys for an indexer, too, which are not counted")
    return Footprint(FootprintSource.CLOSED_FORM, tuple(shares), margins, tuple(notes))


def besides(
    header: Header, configuration: LoadConfiguration, place: int, *, gpus: int, process: ProcessMemory = GUESS
) -> int:
    """
    What the process takes besides what llama.cpp counts: on a GPU the driver's context, on the host the interpreter and
    the tokenizer, and what llama.cpp notes of its cells; and on both the memory in which they work.
    """
    if place != HOST:
        return process.context + working(header, configuration, place, gpus=gpus)
    tokenizer = (_MERGED_TOKEN if header.tokenizer == "gpt2" else _TOKEN) * (header.vocabulary or 0)
    notes = caches.notes(header, configuration)
    return process.base + tokenizer + notes + working(header, configuration, place, gpus=gpus)


def working(header: Header, configuration: LoadConfiguration, place: int, *, gpus: int) -> int:
    """
    Memory that is taken while something is computed, and that llama.cpp counts nowhere.

    The processor's kernels convert what they multiply. On a GPU, the cache of a layer is there as 16-bit numbers too
    where it is quantised (llama.cpp#23446).
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
    widest = max(_feed(header)[0], header.embedding_length or 0, heads * (header.key_length or 0))
    matrix = 0 if configuration.flash else heads * (cells.each if caches.kinds(layers) else tokens)
    return 2 * tokens * (widest + matrix)


class _Placed:
    """Where llama.cpp puts what: `llama_model_base::load_tensors`, and the scheduler's buffers."""

    def __init__(self, header: Header, configuration: LoadConfiguration, gpus: int, free: Sequence[int] = ()) -> None:
        self._header, self._configuration, self._gpus = header, configuration, gpus
        self._layers = caches.layers(header)
        self._cells = caches.cells(header, configuration)
        self._widest = max((layer.value for layer in self._layers), default=0)
        self._all = header.layers or 0
        #: Upper ends of the devices' parts, of 1.
        split: Sequence[float] = configuration.tensor_split or (free if any(free) else (1.0,) * gpus)
        ends: list[float] = list(itertools.accumulate([*split, *(0.0,) * gpus][:gpus]))
        self._ends = [end / ends[-1] for end in ends] if ends else []
        wanted = self._all + 1 if configuration.gpu_layers < 0 else configuration.gpu_layers
        self._offloaded = min(wanted, self._all + 1) if gpus else 0
        self._first = max(self._all + 1 - wanted, 0)

    @property
    def keeps(self) -> bool:
        """Whether requests leave anything that could be parked."""
        return any(layer.key or layer.state for layer in self._layers)

    def place_of(self, layer: int) -> int:
        """Where a layer lies; the output is the layer after the last."""
        if not self._offloaded or not 0 <= layer - self._first < self._offloaded:
            return HOST
        if self._configuration.split_mode == "none":
            return self._configuration.main_gpu
        return bisect_right(self._ends, (layer - self._first) / self._offloaded)

    def weights(self, place: int) -> int:
        """Bytes of the weights that lie there, each tensor padded as the device's buffers are."""
        padding, total = 32 if place == HOST else 128, 0
        output, tied = self.place_of(self._all), True
        by_rows = self._configuration.split_mode in {"row", "tensor"}
        for tensor in self._header.tensors:
            size = -(-tensor.size // padding) * padding
            if tensor.name == "output.weight":
                tied = False
            if (layer := _layer_of(tensor)) is not None:
                own = self.place_of(layer)
            elif tensor.name.startswith(_INPUTS):
                own = HOST
            else:
                own = output
            if by_rows and own != HOST and place != HOST and len(tensor.shape) > 1:
                total += round(size * self._part(place))
            elif own == place:
                total += size
        embeddings = next((tensor for tensor in self._header.tensors if tensor.name == "token_embd.weight"), None)
        repacked = output == HOST and embeddings is not None and embeddings.type in _REPACKED
        if tied and embeddings is not None and place == output and (output != HOST or repacked) and self._writes():
            total += -(-embeddings.size // padding) * padding  # it is the output, too, and lies there once more
        return total

    def cache(self, place: int) -> int:
        """Bytes of the caches and states that lie there, those of the context for embeddings too."""
        configuration = self._configuration
        total = sum(
            caches.layer_bytes(layer, configuration, self._cells, widest_value=self._widest)
            for number, layer in enumerate(self._layers)
            if self.place_of(number) == place
        )
        if (embedding := self._embedding()) is not None:
            cells = caches.cells(self._header, embedding)
            total += sum(
                caches.layer_bytes(layer, embedding, cells, widest_value=self._widest)
                for number, layer in enumerate(self._layers)
                if self.place_of(number) == place
            )
        return total

    def compute(self, place: int) -> int:
        """Bytes of the buffers in which the device computes."""
        contexts = [(self._configuration, self._cells, False)]
        if (embedding := self._embedding()) is not None:
            contexts.append((embedding, caches.cells(self._header, embedding), True))
        computes = any(self.place_of(layer) == place for layer in range(self._all + 1))
        copies = 4 if self._gpus > 1 and self._offloaded > self._all else 1  # pipeline parallelism
        total = 0
        for configuration, cells, embeds in contexts:
            tokens = min(configuration.batch, configuration.ubatch, cells.each * cells.streams)
            inputs = _masks(self._layers, cells, tokens, configuration) + 4 * tokens * (
                self._header.embedding_length or 0
            )
            if computes:
                total += _compute(self._header, self._layers, configuration, cells, tokens, embeds=embeds)
                total += (copies - 1) * inputs
            elif place == HOST:
                total += inputs
        return total

    def output(self) -> int:
        """Bytes of host memory for what comes out: logits of each sequence; vectors, and logits too, of each token."""
        vocabulary, width = self._header.vocabulary or 0, self._header.embedding_length or 0
        total = 4 * self._configuration.sequences * vocabulary
        if (embedding := self._embedding()) is not None:
            # First for each text, then for each token of them; the allocator keeps what the first one had.
            total += 4 * (embedding.context + _TEXTS) * (vocabulary + width)
        return total

    def _embedding(self) -> LoadConfiguration | None:
        """The second context, as a configuration."""
        return embedding_context(self._header, self._configuration)

    def _writes(self) -> bool:
        """Whether there is an output at all."""
        return any(tensor.name.startswith("output") for tensor in self._header.tensors) or bool(
            caches.kinds(self._layers)
        )

    def _part(self, place: int) -> float:
        return self._ends[place] - (self._ends[place - 1] if place else 0)


def embedding_context(header: Header, configuration: LoadConfiguration) -> LoadConfiguration | None:
    """The second context of a model that embeds: a text is computed at once, up to 64 texts side by side."""
    if not configuration.embedding:
        return None
    size = min(configuration.embedding, header.context_length or configuration.embedding)
    return replace(
        configuration, sequences=_TEXTS, context=size, batch=size, ubatch=size, streams=False, kv_type_k="f16",
        kv_type_v="f16", swa_full=True, embedding=0,
    )  # fmt: skip


def _masks(layers: tuple[Layer, ...], cells: CacheCells, tokens: int, configuration: LoadConfiguration) -> int:
    """Bytes that say which token may look at which cell."""
    size = 2 if configuration.flash else 4
    if not (found := caches.kinds(layers)):
        return size * tokens * tokens
    return sum(size * tokens * (cells.window if windowed else cells.each) for windowed in found)


def _compute(
    header: Header,
    layers: tuple[Layer, ...],
    configuration: LoadConfiguration,
    cells: CacheCells,
    tokens: int,
    *,
    embeds: bool,
) -> int:
    """
    Bytes of the buffer for one micro-batch: the greatest of what is needed at the same time.

    That is, for each token: the feed-forward part with its gate, the experts' results, the attention, the projections
    of a layer with a state; and at the end the logits. The factors were found in llama.cpp's dry runs of 20 shapes.
    """
    width, heads = header.embedding_length or 0, max(header.heads, default=0)
    query = heads * (header.key_length or 0)
    pair = max((layer.key + layer.value for layer in layers), default=0)
    feed, gated = _feed(header)
    states = max((layer.state for layer in layers), default=0)
    masks = _masks(layers, cells, tokens, configuration)

    streams = [(3 if gated else 1) * feed + 3 * width + max(width, query)]
    if used := header.experts_used:
        inner = _number(header, "expert_feed_forward_length") or feed // used
        streams.append(2 * used * width + used * inner + 3 * width)
    attention = 3 * width + 3 * max(width, query) + pair
    found = [masks + tokens * (4 * max(*streams, attention) + _INDICES)]
    if not configuration.flash and heads:
        # The whole matrix: each head, each token, each cell.
        looked = cells.each if caches.kinds(layers) else tokens
        found.append(masks + tokens * (4 * (3 * width + 3 * query + pair + heads * looked) + _INDICES))
    if states:
        inner, state = _number(header, "ssm.inner_size"), _number(header, "ssm.state_size")
        projected = 2 * inner + 2 * _number(header, "ssm.group_count") * state + _number(header, "ssm.time_step_rank")
        each = 4 * (3.3 * (projected or 3 * width) + width)
        found.append(round(masks + tokens * each + 1.03 * states * configuration.sequences))
    vocabulary = header.vocabulary or 0
    if embeds:
        found.append(4 * tokens * (vocabulary + 3 * width + _TEXTS) + masks if caches.kinds(layers) or states else 0)
    else:
        outputs = min(tokens, configuration.sequences)
        found.append(4 * (outputs * (vocabulary + width) + tokens * width))
    return max(found)


def _feed(header: Header) -> tuple[int, bool]:
    """Values of a token inside the feed-forward part, of all experts that are used; and whether it has a gate."""
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


def _near(adapter: Header, placed: _Placed, place: int) -> int:
    """Bytes of an adapter that lie there: each tensor beside the one that it changes."""
    total = 0
    for tensor in adapter.tensors:
        layer = _layer_of(tensor)
        total += tensor.size if placed.place_of(-1 if layer is None else layer) == place else 0
    return total


def _layer_of(tensor: Tensor) -> int | None:
    """The layer that a tensor belongs to."""
    block, _, rest = tensor.name.partition(".")
    number = rest.partition(".")[0]
    return int(number) if block == "blk" and number.isdigit() else None


def _projector_compute(projector: Header) -> int:
    """Bytes in which a picture is computed: its patches through the widest layer, and their attention."""
    size, patch = (_number(projector, f"vision.{name}") for name in ("image_size", "patch_size"))
    patches = (size // patch) ** 2 if patch else 1500  # half a minute of sound
    kind = "vision" if patch else "audio"
    width, feed, heads = (
        _number(projector, f"{kind}.{name}")
        for name in ("embedding_length", "feed_forward_length", "attention.head_count")
    )
    return 4 * patches * (6 * width + 2 * feed + heads * patches)


def _number(header: Header, name: str) -> int:
    """A number of the architecture; 0 where the file does not give it."""
    value = header.metadata.get(f"{header.architecture}.{name}")
    return value if isinstance(value, int) and not isinstance(value, bool) else 0

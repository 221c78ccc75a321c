"""
Caches: what each layer of a model keeps for the texts under way, by the file's header.

A layer with attention keeps keys and values: of all cells, or of a window. With a compressed cache (MLA) it keeps
keys alone. A layer without attention keeps a state for each sequence, however long that is. Some share another's.

The rules are llama.cpp's own (`llama_model::create_memory`, `llama_kv_cache`, `llama_memory_recurrent` and the
`load_arch_hparams` of its models), and give its numbers to the byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.catalog.engine_options import KvType
from app.catalog.metadata import Header
from app.footprint.configuration import KV_BLOCKS, LoadConfiguration

#: llama.cpp pads contexts, and caches of windows, to so many cells.
PAD = 256

#: Bytes of RAM in which llama.cpp notes of each cell whose it is; seen with a million cells and more.
_NOTE = 52

#: Architectures whose layers have no cache at all: each text is computed at once.
_WITHOUT = frozenset(
    {"bert", "dream", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "llada", "llada-moe",
     "modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe", "rnd1", "wavtokenizer-dec"}
)  # fmt: skip
#: Those that keep nothing but states.
_RECURRENT = frozenset({"arwkv7", "mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7"})
#: Those in which every so-manieth layer has attention, and the others keep states.
_INTERVALS: Mapping[str, int] = {"minimax-01": 8, "qwen35": 4, "qwen35moe": 4, "qwen3next": 4, "qwen4exp": 4}
#: Those of which an indexer keeps keys besides, which is not counted here.
_INDEXED = frozenset(
    {"deepseek32", "deepseek4", "dots3note", "glm-dsa", "glm5-next", "hy-v4", "minimax-m3", "qwen4exp"}
)


@dataclass(frozen=True, slots=True)
class _Window:
    """Which layers look back over a window only."""

    #: Every so-manieth layer looks over everything: the last of its group, or the first.
    period: int = 1
    dense_first: bool = False
    #: The window where the file names none; 0 for no windows then.
    default: int = 0


#: As the models' code says, where the file's own pattern does not.
_WINDOWS: Mapping[str, _Window] = {
    "afmoe": _Window(4), "cohere2": _Window(4), "cohere2moe": _Window(4, dense_first=True),
    "exaone-moe": _Window(4, default=128), "exaone4": _Window(4), "gemma2": _Window(2, default=4096),
    "gemma3": _Window(6), "gemma3n": _Window(5), "gemma4": _Window(), "gpt-oss": _Window(2), "granite-swa": _Window(),
    "laguna": _Window(4, dense_first=True), "llama4": _Window(4, default=8192), "maple": _Window(),
    "mellum": _Window(4), "mimo2": _Window(), "muse-glimmer": _Window(4), "olmo2": _Window(4), "plamo3": _Window(8),
    "smallthinker": _Window(4, dense_first=True), "spark2_5": _Window(), "step35": _Window(),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class CacheCells:
    """How many cells the caches of a context have."""

    #: Of one cache: all of them, or those of one sequence with streams.
    each: int
    #: Of one cache of a window.
    window: int
    #: Caches side by side.
    streams: int


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer keeps."""

    #: Values of a cell's key and value.
    key: int = 0
    value: int = 0
    #: It looks over a window.
    windowed: bool = False
    #: Bytes of a sequence's state.
    state: int = 0


def layers(header: Header) -> tuple[Layer, ...]:
    """What each layer keeps; layers that only predict further tokens (MTP) keep nothing here."""
    count = _count(header)
    if header.architecture in _WITHOUT:
        return (Layer(),) * count
    windowed, recurrent, state = _windowed(header, count), _recurrent(header, count), _state(header)
    sharing = _sharing(header, count)
    found = []
    for number in range(count):
        keeps = number < sharing and not (recurrent[number] and header.architecture != "falcon-h1")
        heads = _at(header.kv_heads, number) if keeps else 0
        key, value = _lengths(header, windowed=windowed[number])
        compressed = bool(_key(header, "attention.key_length_mla"))
        found.append(
            Layer(
                key=key * heads,
                value=0 if compressed else value * heads,
                windowed=windowed[number],
                state=state if recurrent[number] else 0,
            )
        )
    return tuple(found)


def cells(header: Header, configuration: LoadConfiguration) -> CacheCells:
    """How many cells the caches have, with llama.cpp's padding."""
    streams = configuration.sequences if configuration.streams else 1
    each = _padded(_padded(configuration.context) // streams)
    if configuration.swa_full or not any(_windowed(header, _count(header))):
        return CacheCells(each, each, streams)
    window = _window(header) * (1 if configuration.streams else configuration.sequences)
    return CacheCells(
        each, min(each, _padded(min(each, window + min(configuration.ubatch, configuration.batch)))), streams
    )


def layer_bytes(layer: Layer, configuration: LoadConfiguration, counted: CacheCells, *, widest_value: int = 0) -> int:
    """Bytes of one layer's cache and state. Without flash attention each layer's values are as wide as the widest."""
    count = (counted.window if layer.windowed else counted.each) * counted.streams
    value = max(layer.value, widest_value) if layer.value and not configuration.flash else layer.value
    row = _row(layer.key, configuration.kv_type_k) + _row(value, configuration.kv_type_v)
    return count * row + layer.state * configuration.sequences


def notes(header: Header, configuration: LoadConfiguration) -> int:
    """Bytes of RAM in which llama.cpp keeps account of the cells. It counts them nowhere, and takes them at once."""
    counted = cells(header, configuration)
    each = (counted.window if windowed else counted.each for windowed in kinds(layers(header)))
    return _NOTE * counted.streams * sum(each)


def counts_all(header: Header) -> bool:
    """Whether everything that the layers keep is counted here."""
    return header.architecture not in _INDEXED


def kinds(found: tuple[Layer, ...]) -> tuple[bool, ...]:
    """For each kind of cache that there is, whether it is one of windows. Attention needs a mask for each."""
    return tuple(sorted({layer.windowed for layer in found if layer.key}))


def _count(header: Header) -> int:
    return max((header.layers or 0) - (_key(header, "nextn_predict_layers") or 0), 0)


def _sharing(header: Header, count: int) -> int:
    """The layer from which on all share the caches of others."""
    if header.architecture == "gemma3n":
        return min(20, count)
    return count - (_key(header, "attention.shared_kv_layers") or 0)


def _lengths(header: Header, *, windowed: bool) -> tuple[int, int]:
    key, value = header.key_length or 0, header.value_length or 0
    if windowed:
        key = _key(header, "attention.key_length_swa") or key
        value = _key(header, "attention.value_length_swa") or value
    return key, value


def _window(header: Header) -> int:
    """Cells that a layer with a window looks back; 0 without such layers."""
    known = _WINDOWS.get(header.architecture)
    if header.architecture.startswith("lfm2"):
        return header.sliding_window or 0
    if known is None or (header.architecture == "exaone4" and header.layers != 64):
        return 0
    if (
        header.architecture in {"llama4", "smallthinker"}
        and header.metadata.get(f"{header.architecture}.attention.sliding_window") == 0
    ):
        return 0
    if header.architecture == "llama4":
        return known.default
    return header.sliding_window or known.default


def _windowed(header: Header, count: int) -> tuple[bool, ...]:
    """Which layers look over a window."""
    if not _window(header):
        return (False,) * count
    if header.architecture.startswith("lfm2"):
        return tuple(bool(_at(header.kv_heads, number)) for number in range(count))
    known = _WINDOWS[header.architecture]
    given = header.metadata.get(f"{header.architecture}.attention.sliding_window_pattern")
    if isinstance(given, tuple):
        return tuple(bool(_at(given, number)) for number in range(count))
    period = given if isinstance(given, int) and not isinstance(given, bool) else known.period
    if period == 0:
        return (True,) * count
    if known.dense_first:
        return tuple(number % period != 0 for number in range(count))
    return tuple(number % period < period - 1 for number in range(count))


def _recurrent(header: Header, count: int) -> tuple[bool, ...]:
    """Which layers keep a state."""
    architecture = header.architecture
    if architecture in _RECURRENT or architecture == "falcon-h1":
        return (True,) * count
    given = header.metadata.get(f"{architecture}.attention.recurrent_layers")
    if isinstance(given, tuple):
        return tuple(bool(_at(given, number)) for number in range(count))
    if architecture in _INTERVALS:
        interval = _key(header, "full_attention_interval") or _INTERVALS[architecture]
        return tuple((number + 1) % interval != 0 for number in range(count))
    feed = header.metadata.get(f"{architecture}.feed_forward_length")
    without_feed = [not _at(feed, number) if isinstance(feed, tuple) else True for number in range(count)]
    only_alone = architecture.startswith("nemotron_h")
    return tuple(
        bool(_state(header)) and not _at(header.kv_heads, number) and (without_feed[number] or not only_alone)
        for number in range(count)
    )


def _state(header: Header) -> int:
    """Bytes of the state that a layer without attention keeps for a sequence: 32-bit numbers."""
    width, heads = header.embedding_length or 0, max(header.heads, default=0)
    inner, state = _key(header, "ssm.inner_size") or 0, _key(header, "ssm.state_size") or 0
    kernel = _key(header, "ssm.conv_kernel") or 0
    if head := _key(header, "wkv.head_size"):
        return 4 * width * ((_key(header, "token_shift_count") or 2) + head)
    if length := _key(header, "shortconv.l_cache"):
        return 4 * width * (length - 1)
    if head := _key(header, "kda.head_dim"):
        return 4 * (3 * ((kernel or 4) - 1) * heads * head + head * head * heads)
    if header.architecture == "minimax-01":
        return 4 * heads * (header.key_length or 0) ** 2
    convolved = inner + 2 * (_key(header, "ssm.group_count") or 0) * state
    return 4 * (max(kernel - 1, 0) * convolved + state * inner)


def _key(header: Header, name: str) -> int | None:
    value = header.metadata.get(f"{header.architecture}.{name}")
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _at(values: tuple[Any, ...], number: int) -> int:
    """The number of a layer; what the file does not say is nothing."""
    return int(values[number]) if number < len(values) else int(values[-1]) if len(values) == 1 else 0


def _row(values: int, kind: KvType) -> int:
    """Bytes of a cell; llama.cpp refuses rows that are no whole blocks."""
    block, size = KV_BLOCKS[kind]
    return -(-values // block) * size


def _padded(count: int) -> int:
    return -(-count // PAD) * PAD

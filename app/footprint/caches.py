"""
Cache sizes: the bytes that each layer of a model keeps for its sequences, computed from the header of the file.

An attention layer keeps keys and values of all cells, or of a sliding window. With a compressed cache (MLA) it keeps
only keys. A recurrent layer keeps a state of fixed size for each sequence. Some layers share the cache of another.

The rules are those of llama.cpp (`llama_model::create_memory`, `llama_kv_cache`, `llama_memory_recurrent` and the
`load_arch_hparams` of its models); the results equal its own numbers to the byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.catalog.engine_options import KvType
from app.catalog.metadata import Header
from app.footprint.configuration import KV_BLOCKS, LoadConfiguration

#: llama.cpp pads contexts, and caches of sliding windows, to a multiple of this number of cells.
PAD = 256

#: Bytes of RAM in which llama.cpp records the owner of each cell; measured with a million cells and more.
_CELL_RECORD_BYTES = 52

#: Architectures without any cache: each text is computed in one pass.
_CACHELESS = frozenset(
    {"bert", "dream", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "llada", "llada-moe",
     "modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe", "rnd1", "wavtokenizer-dec"}
)  # fmt: skip
#: Architectures with recurrent layers only.
_RECURRENT = frozenset({"arwkv7", "mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7"})
#: Architectures with recurrent layers in which every n-th layer has attention; maps them to n.
_INTERVALS: Mapping[str, int] = {"minimax-01": 8, "qwen35": 4, "qwen35moe": 4, "qwen3next": 4, "qwen4exp": 4}
#: Architectures with an indexer, whose additional keys are not counted here.
_INDEXED = frozenset(
    {"deepseek32", "deepseek4", "dots3note", "glm-dsa", "glm5-next", "hy-v4", "minimax-m3", "qwen4exp"}
)


@dataclass(frozen=True, slots=True)
class _Window:
    """The pattern of sliding-window layers in an architecture."""

    #: Every n-th layer has full attention: the last layer of each group of n, or the first.
    period: int = 1
    dense_first: bool = False
    #: The window when the file has none; 0 means that there are no windows then.
    default: int = 0


#: The patterns in the code of llama.cpp's models, which apply when the file has none.
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
    """The number of cells in the caches of a context."""

    #: Cells of one full cache: all cells, or with streams those of one sequence.
    each: int
    #: Cells of one sliding-window cache.
    window: int
    #: Number of caches: with streams one for each sequence, else 1.
    streams: int


@dataclass(frozen=True, slots=True)
class Layer:
    """The sizes of one layer's cache and state."""

    #: Number of values in the key of a cell, and in its value.
    key: int = 0
    value: int = 0
    #: The layer has a sliding window.
    windowed: bool = False
    #: Bytes of the state of one sequence.
    state: int = 0


def layers(header: Header) -> tuple[Layer, ...]:
    """Returns the sizes of each layer, without layers for multi-token prediction (MTP), which keep nothing here."""
    count = _layer_count(header)
    if header.architecture in _CACHELESS:
        return (Layer(),) * count
    windowed, recurrent, state = _windowed_layers(header, count), _recurrent_layers(header, count), _state_bytes(header)
    sharing = _first_shared_layer(header, count)
    found = []
    for number in range(count):
        keeps = number < sharing and not (recurrent[number] and header.architecture != "falcon-h1")
        heads = _value_at(header.kv_heads, number) if keeps else 0
        key, value = _head_lengths(header, windowed=windowed[number])
        compressed = bool(_number(header, "attention.key_length_mla"))
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
    """Returns the number of cells of the caches, with llama.cpp's padding."""
    streams = configuration.sequences if configuration.streams else 1
    each = _padded(_padded(configuration.context) // streams)
    if configuration.swa_full or not any(_windowed_layers(header, _layer_count(header))):
        return CacheCells(each, each, streams)
    window = _window(header) * (1 if configuration.streams else configuration.sequences)
    return CacheCells(
        each, min(each, _padded(min(each, window + min(configuration.ubatch, configuration.batch)))), streams
    )


def layer_bytes(layer: Layer, configuration: LoadConfiguration, counted: CacheCells, *, widest_value: int = 0) -> int:
    """
    Returns the bytes of one layer's cache and state.

    Without flash attention, the values of each layer are padded to `widest_value`, those of the widest layer.
    """
    count = (counted.window if layer.windowed else counted.each) * counted.streams
    value = max(layer.value, widest_value) if layer.value and not configuration.flash else layer.value
    row = _row_bytes(layer.key, configuration.kv_type_k) + _row_bytes(value, configuration.kv_type_v)
    return count * row + layer.state * configuration.sequences


def cell_records(header: Header, configuration: LoadConfiguration) -> int:
    """Returns the bytes of RAM of llama.cpp's records of cells, which it does not report and uses from the load on."""
    counted = cells(header, configuration)
    each = (counted.window if windowed else counted.each for windowed in cache_kinds(layers(header)))
    return _CELL_RECORD_BYTES * counted.streams * sum(each)


def is_complete(header: Header) -> bool:
    """Returns whether everything that the layers keep is counted here."""
    return header.architecture not in _INDEXED


def cache_kinds(found: tuple[Layer, ...]) -> tuple[bool, ...]:
    """Returns for each kind of cache in use whether it is a sliding-window cache. Attention needs one mask for each."""
    return tuple(sorted({layer.windowed for layer in found if layer.key}))


def _layer_count(header: Header) -> int:
    return max((header.layers or 0) - (_number(header, "nextn_predict_layers") or 0), 0)


def _first_shared_layer(header: Header, count: int) -> int:
    """Returns the index of the first layer that shares the cache of another; all later layers do too."""
    if header.architecture == "gemma3n":
        return min(20, count)
    return count - (_number(header, "attention.shared_kv_layers") or 0)


def _head_lengths(header: Header, *, windowed: bool) -> tuple[int, int]:
    key, value = header.key_length or 0, header.value_length or 0
    if windowed:
        key = _number(header, "attention.key_length_swa") or key
        value = _number(header, "attention.value_length_swa") or value
    return key, value


def _window(header: Header) -> int:
    """Returns the number of cells in a sliding window; 0 without such layers."""
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


def _windowed_layers(header: Header, count: int) -> tuple[bool, ...]:
    """Returns for each layer whether it has a sliding window."""
    if not _window(header):
        return (False,) * count
    if header.architecture.startswith("lfm2"):
        return tuple(bool(_value_at(header.kv_heads, number)) for number in range(count))
    known = _WINDOWS[header.architecture]
    given = header.metadata.get(f"{header.architecture}.attention.sliding_window_pattern")
    if isinstance(given, tuple):
        return tuple(bool(_value_at(given, number)) for number in range(count))
    period = given if isinstance(given, int) and not isinstance(given, bool) else known.period
    if period == 0:
        return (True,) * count
    if known.dense_first:
        return tuple(number % period != 0 for number in range(count))
    return tuple(number % period < period - 1 for number in range(count))


def _recurrent_layers(header: Header, count: int) -> tuple[bool, ...]:
    """Returns for each layer whether it keeps a state."""
    architecture = header.architecture
    if architecture in _RECURRENT or architecture == "falcon-h1":
        return (True,) * count
    given = header.metadata.get(f"{architecture}.attention.recurrent_layers")
    if isinstance(given, tuple):
        return tuple(bool(_value_at(given, number)) for number in range(count))
    if architecture in _INTERVALS:
        interval = _number(header, "full_attention_interval") or _INTERVALS[architecture]
        return tuple((number + 1) % interval != 0 for number in range(count))
    feed = header.metadata.get(f"{architecture}.feed_forward_length")
    without_feed = [not _value_at(feed, number) if isinstance(feed, tuple) else True for number in range(count)]
    only_alone = architecture.startswith("nemotron_h")
    return tuple(
        bool(_state_bytes(header))
        and not _value_at(header.kv_heads, number)
        and (without_feed[number] or not only_alone)
        for number in range(count)
    )


def _state_bytes(header: Header) -> int:
    """Returns the bytes of the state that a recurrent layer keeps for one sequence, as 32-bit numbers."""
    width, heads = header.embedding_length or 0, max(header.heads, default=0)
    inner, state = _number(header, "ssm.inner_size") or 0, _number(header, "ssm.state_size") or 0
    kernel = _number(header, "ssm.conv_kernel") or 0
    if head := _number(header, "wkv.head_size"):
        return 4 * width * ((_number(header, "token_shift_count") or 2) + head)
    if length := _number(header, "shortconv.l_cache"):
        return 4 * width * (length - 1)
    if head := _number(header, "kda.head_dim"):
        return 4 * (3 * ((kernel or 4) - 1) * heads * head + head * head * heads)
    if header.architecture == "minimax-01":
        return 4 * heads * (header.key_length or 0) ** 2
    convolved = inner + 2 * (_number(header, "ssm.group_count") or 0) * state
    return 4 * (max(kernel - 1, 0) * convolved + state * inner)


def _number(header: Header, name: str) -> int | None:
    value = header.metadata.get(f"{header.architecture}.{name}")
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _value_at(values: tuple[Any, ...], number: int) -> int:
    """Returns the value of a layer from a list of all layers; 0 when the file has none."""
    return int(values[number]) if number < len(values) else int(values[-1]) if len(values) == 1 else 0


def _row_bytes(values: int, kind: KvType) -> int:
    """Returns the bytes of a row; llama.cpp rejects rows that are not a multiple of the block size."""
    block, size = KV_BLOCKS[kind]
    return -(-values // block) * size


def _padded(count: int) -> int:
    return -(-count // PAD) * PAD

"""The closed form, compared with values computed by hand. tests/workers compares it with llama.cpp's own figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from app.catalog import header
from app.catalog.metadata import Header
from app.catalog.model import Model
from app.footprint import caches, closed_form, configuration
from app.footprint.closed_form import ProcessMemory
from app.footprint.configuration import LoadConfiguration
from app.footprint.footprint import HOST, MIB, Footprint, FootprintSource, Share

#: A llama of four layers: a layer's weights are 64 by 64 by 4 bytes, embeddings 100 by 64 by 4.
LAYER, EMBEDDINGS = 64 * 64 * 4, 100 * 64 * 4
PLAIN = LoadConfiguration(context=1024, sequences=2, gpu_layers=-1)


def llama(
    folder: Path, *, name: str = "llama.gguf", tied: bool = False, architecture: str = "llama", **keys: Any
) -> Header:
    writer = gguf.GGUFWriter(folder / name, architecture)
    given = {
        "block_count": 4, "embedding_length": 64, "feed_forward_length": 128, "context_length": 4096,
        "attention.head_count": 4, "attention.head_count_kv": 2, "vocab_size": 100,
    } | keys  # fmt: skip
    for key, value in given.items():
        add = {list: writer.add_array, str: writer.add_string}.get(type(value), writer.add_uint32)
        add(f"{architecture}.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((100, 64), np.float32))
    for layer in range(4):
        writer.add_tensor(f"blk.{layer}.attn_q.weight", np.zeros((64, 64), np.float32))
    if not tied:
        writer.add_tensor("output.weight", np.zeros((100, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return header.read(folder / name)


def shares(read: Header, given: LoadConfiguration, gpus: int, **more: Any) -> dict[int, Share]:
    return {share.place: share for share in closed_form.closed_form(read, given, gpus=gpus, **more).shares}


#: Keys and values of one cell of a layer: 2 heads by 16 values by 2 bytes, twice.
CELL = 2 * 2 * 16 * 2


def test_on_the_cpu_everything_is_in_host_memory(tmp_path: Path) -> None:
    host = shares(llama(tmp_path), replace(PLAIN, gpu_layers=0), 0)[HOST]
    assert host.weights == 4 * LAYER + 2 * EMBEDDINGS
    assert host.cache == 4 * 1024 * CELL
    assert host.output == 2 * 100 * 4


def test_on_a_gpu_the_embeddings_stay_in_host_memory(tmp_path: Path) -> None:
    found = shares(llama(tmp_path), PLAIN, 1)
    assert (found[HOST].weights, found[HOST].cache) == (EMBEDDINGS, 0)
    assert (found[0].weights, found[0].cache) == (4 * LAYER + EMBEDDINGS, 4 * 1024 * CELL)
    tied = shares(llama(tmp_path, name="tied.gguf", tied=True), PLAIN, 1)
    assert (tied[HOST].weights, tied[0].weights) == (EMBEDDINGS, 4 * LAYER + EMBEDDINGS), "stored again as the output"


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ((), ((3, 0), (1, 1))),  # five parts, including the output: 0, 1/5, 2/5 | 3/5, 4/5
        ((3.0, 1.0), ((4, 0), (0, 1))),
        ((1.0, 0.0), ((4, 1), (0, 0))),
    ],
)
def test_layers_are_split_over_gpus_like_in_llama_cpp(tmp_path: Path, split: Any, expected: Any) -> None:
    found = shares(llama(tmp_path), replace(PLAIN, tensor_split=split), 2)
    for gpu, (layers, outputs) in enumerate(expected):
        assert found[gpu].weights == layers * LAYER + outputs * EMBEDDINGS
        assert found[gpu].cache == layers * 1024 * CELL


def test_without_a_tensor_split_layers_are_split_by_free_memory(tmp_path: Path) -> None:
    found = shares(llama(tmp_path), PLAIN, 2, free=[30 * MIB, 10 * MIB])
    assert (found[0].weights, found[1].weights) == (4 * LAYER, EMBEDDINGS)


def test_a_partial_offload_places_the_last_layers_on_the_gpu(tmp_path: Path) -> None:
    found = shares(llama(tmp_path), replace(PLAIN, gpu_layers=2), 1)
    assert (found[0].weights, found[0].cache) == (LAYER + EMBEDDINGS, 1024 * CELL), "the output counts as a layer"
    assert (found[HOST].weights, found[HOST].cache) == (3 * LAYER + EMBEDDINGS, 3 * 1024 * CELL)
    one = shares(llama(tmp_path), replace(PLAIN, split_mode="none", main_gpu=1), 2)
    assert (one[0].weights, one[1].weights) == (0, 4 * LAYER + EMBEDDINGS)


def test_a_quantised_cache_needs_working_memory_on_a_gpu(tmp_path: Path) -> None:
    read = llama(tmp_path)
    quantised = replace(PLAIN, kv_type_k="q8_0", kv_type_v="q8_0")
    plain, small = (shares(read, given, 1, process=ProcessMemory(0, 0))[0] for given in (PLAIN, quantised))
    assert small.cache == plain.cache * 34 // 64
    assert (plain.process, small.process) == (0, 1024 * CELL), "one layer's keys and values as 16-bit numbers"
    parted = replace(quantised, context=4096, sequences=4, streams=True)
    assert shares(read, parted, 1, process=ProcessMemory(0, 0))[0].process == 4096 * CELL, "those of all sequences"


def test_each_process_has_a_driver_context_on_each_gpu(tmp_path: Path) -> None:
    found = shares(llama(tmp_path), PLAIN, 2, process=ProcessMemory(base=7 * MIB, context=300 * MIB))
    assert [found[gpu].process for gpu in (0, 1)] == [300 * MIB] * 2
    assert found[HOST].process >= 7 * MIB


@pytest.mark.parametrize(
    ("architecture", "keys", "windowed"),
    [
        ("gemma3", {"attention.sliding_window": 256}, (True, True, True, True)),
        ("gemma3", {"attention.sliding_window": 256, "attention.sliding_window_pattern": 2}, (True, False) * 2),
        ("gemma3", {}, (False,) * 4),
        ("gpt-oss", {"attention.sliding_window": 128}, (True, False) * 2),
        ("smallthinker", {"attention.sliding_window": 256}, (False, True, True, True)),
        ("llama", {"attention.sliding_window": 256}, (False,) * 4),
        ("gemma4", {"attention.sliding_window": 99, "attention.sliding_window_pattern": [1, 0] * 2}, (True, False) * 2),
    ],
)  # fmt: skip
def test_sliding_window_layers_of_each_architecture(
    tmp_path: Path, architecture: str, keys: dict[str, Any], windowed: tuple[bool, ...]
) -> None:
    read = llama(tmp_path, architecture=architecture, **keys)
    assert tuple(layer.windowed for layer in caches.layers(read)) == windowed
    cells = caches.cells(read, LoadConfiguration(context=8192, sequences=2, ubatch=64, swa_full=False))
    window = keys.get("attention.sliding_window", 0)
    assert cells.each == 8192
    assert cells.window == (-(-(2 * window + 64) // 256) * 256 if any(windowed) else 8192)


def test_a_compressed_cache_has_no_values(tmp_path: Path) -> None:
    mla = {"attention.key_length": 96, "attention.value_length": 64, "attention.head_count_kv": 1}
    keys = mla | {"attention.key_length_mla": 32, "attention.value_length_mla": 16}
    layer = caches.layers(llama(tmp_path, architecture="deepseek2", **keys))[0]
    assert (layer.key, layer.value) == (96, 0)


def test_recurrent_layers_keep_states(tmp_path: Path) -> None:
    ssm = {"ssm.conv_kernel": 4, "ssm.inner_size": 128, "ssm.state_size": 16, "ssm.group_count": 1}
    read = llama(tmp_path, architecture="granitehybrid", **ssm | {"attention.head_count_kv": [0, 2, 0, 0]})
    state = 4 * (3 * (128 + 2 * 16) + 16 * 128)
    assert [(layer.key, layer.state) for layer in caches.layers(read)] == [(0, state), (32, 0), (0, state), (0, state)]
    host = shares(read, replace(PLAIN, gpu_layers=0), 0)[HOST]
    assert host.cache == 1024 * CELL + 3 * 2 * state


def test_an_adapter_is_stored_with_the_layers_that_it_changes(tmp_path: Path) -> None:
    read = llama(tmp_path)
    adapter = llama(tmp_path, name="lora.gguf")  # any file with tensors of layers
    without, having = shares(read, PLAIN, 1), shares(read, PLAIN, 1, adapters=[adapter])
    assert having[0].weights - without[0].weights == 4 * LAYER
    assert having[HOST].weights - without[HOST].weights == 2 * EMBEDDINGS


def test_a_projector_adds_its_weights_and_buffers_for_an_image(tmp_path: Path) -> None:
    keys = {"vision.image_size": 224, "vision.patch_size": 14, "vision.embedding_length": 64,
            "vision.feed_forward_length": 128, "vision.attention.head_count": 4}  # fmt: skip
    read, projector = llama(tmp_path), llama(tmp_path, name="mmproj.gguf", architecture="clip", **keys)
    without, seeing = (closed_form.closed_form(read, PLAIN, gpus=1, projector=one) for one in (None, projector))
    assert seeing.shares[1].weights - without.shares[1].weights == projector.tensor_bytes
    assert seeing.shares[1].compute > without.shares[1].compute
    assert seeing.margins[0] > without.margins[0]


def test_a_projector_that_follows_the_size_of_images_is_bounded_by_their_tokens(tmp_path: Path) -> None:
    keys = {"vision.image_size": 560, "vision.patch_size": 14, "vision.embedding_length": 64,
            "vision.feed_forward_length": 128, "vision.attention.head_count": 4,
            "projector_type": "qwen2vl_merger", "vision.spatial_merge_size": 2}  # fmt: skip
    read, projector = llama(tmp_path), llama(tmp_path, name="mmproj.gguf", architecture="clip", **keys)
    one = replace(PLAIN, gpu_layers=0)
    small, large = (
        closed_form.closed_form(read, replace(one, image_tokens=tokens), projector=projector) for tokens in (1024, 0)
    )
    assert large.shares[0].compute - small.shares[0].compute == 4 * (4096 - 1024) * 4 * (6 * 64 + 2 * 128 + 3 * 14**2)
    assert small.copied == projector.tensor_bytes, "it is read into the process, not mapped"
    assert "image_tokens" not in one.as_json(), "measurements of models without images stay valid"
    assert LoadConfiguration.of_json(replace(one, image_tokens=9).as_json()).image_tokens == 9


def test_the_embedding_context_is_counted(tmp_path: Path) -> None:
    read, one = llama(tmp_path), replace(PLAIN, gpu_layers=0)
    plain, embedding = (shares(read, given, 0)[HOST] for given in (one, replace(one, embedding=512)))
    assert embedding.cache - plain.cache == 4 * 512 * CELL
    assert embedding.output - plain.output == 4 * (512 + 64) * (100 + 64), (
        "logits and an embedding for each token and text"
    )


def test_an_unverified_architecture_has_a_greater_margin(tmp_path: Path) -> None:
    known = closed_form.closed_form(llama(tmp_path), replace(PLAIN, context=2**20))
    odd = closed_form.closed_form(llama(tmp_path, architecture="glm-dsa"), replace(PLAIN, context=2**20))
    assert odd.margins[HOST] > 2 * known.margins[HOST]
    assert known.notes == ()
    assert any("not verified" in note for note in odd.notes)
    assert any("indexer" in note for note in odd.notes)


def test_reserved_bytes_and_margins() -> None:
    made = Footprint(FootprintSource.MEASURED, (Share(HOST, weights=900 * MIB, parked=100 * MIB),), {HOST: 20 * MIB})
    assert made.reserved() == {HOST: 1020 * MIB}
    assert made.with_margin_floor(0.1).margins == {HOST: 100 * MIB}
    assert made.with_margin_floor(0.01).margins == {HOST: 20 * MIB}
    greater = replace(made, shares=(Share(HOST, weights=901 * MIB, parked=100 * MIB),))
    assert made.maximum(greater).shares == greater.maximum(made).shares == greater.shares
    assert Footprint.of_json(made.as_json()) == made


def test_a_catalogue_entry_becomes_a_load_configuration() -> None:
    entry = {"name": "m:1", "use_cases": ["embed"], "source": {"path": "/m.gguf"}, "context": 512, "slots": 3}
    given = configuration.of_model(Model.model_validate(entry), gpus=0)
    assert (given.context, given.sequences, given.embedding, given.gpu_layers) == (1536, 6, 2048, 0)
    tuned = entry | {"engine": {"reproducible": True, "ubatch": 2048}, "use_cases": ["chat"]}
    given = configuration.of_model(Model.model_validate(tuned), gpus=1)
    assert (given.sequences, given.streams, given.flash_attention) == (3, True, False)
    assert (given.ubatch, given.embedding, given.gpu_layers) == (512, 0, -1), "never more than the batch"
    assert LoadConfiguration.of_json(given.as_json()) == given

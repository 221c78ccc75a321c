"""Tests of the header reader, with the real SmolLM2 file and damaged copies of it."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.catalog import header
from app.kernel.errors import ModelFileDamaged, ModelFileMissing

MakeGguf = Callable[..., Path]


def reason(path: Path) -> str:
    with pytest.raises(ModelFileDamaged) as caught:
        header.read(path)
    assert caught.value.path == path
    assert str(path) in str(caught.value)
    return caught.value.reason


def copy(source: Path, target: Path, length: int) -> Path:
    with source.open("rb") as file:
        target.write_bytes(file.read(length))
    return target


def test_the_header_of_smollm2_is_read(smollm2: Path) -> None:
    read = header.read(smollm2)
    assert (read.architecture, read.kind, read.quantisation, read.size_label) == ("llama", "model", "Q4_1", "135M")
    assert (read.context_length, read.layers, read.embedding_length, read.vocabulary) == (8192, 30, 576, 49152)
    assert (read.heads, read.kv_heads, read.key_length, read.value_length) == ((9,) * 30, (3,) * 30, 64, 64)
    assert (read.experts, read.sliding_window, read.tokenizer, read.licence) == (None, None, "gpt2", "apache-2.0")
    assert read.chat_template is not None
    assert "<|im_start|>" in read.chat_template
    assert read.file_bytes == smollm2.stat().st_size
    assert read.path == smollm2


def test_the_result_equals_that_of_the_package_gguf(smollm2: Path) -> None:
    """The package is the reference; it needs seconds, because it keeps every token."""
    reference = gguf.GGUFReader(smollm2)
    read = header.read(smollm2)
    assert [(t.name, t.type, t.shape, t.size) for t in read.tensors] == [
        (t.name, t.tensor_type.name, tuple(t.shape.tolist()), t.n_bytes) for t in reference.tensors
    ]
    assert read.parameters == sum(int(t.n_elements) for t in reference.tensors)
    assert read.tensor_bytes == sum(t.n_bytes for t in reference.tensors)
    tokens = reference.fields["tokenizer.ggml.tokens"]
    assert read.vocabulary == len(tokens.data)
    for key, field in reference.fields.items():
        if key.startswith("GGUF.") or field.types[0] == gguf.GGUFValueType.ARRAY:
            continue
        assert read.metadata[key] == field.contents(), key


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (0, "it is empty"),
        (3, r"begins with b'GGU'"),
        (4, "ends in its header: its preamble reaches to byte 8, the file has 4"),
        (23, "ends in its header: its preamble"),
        (40, "ends in its header: key 1 of 33"),
        (1_000, "it ends in its header: key 23 of 33 reaches to byte 1,002, the file has 1,000"),
        (100_000, "the value of tokenizer.ggml.tokens"),
        (1_000_000, "the value of tokenizer.ggml"),
        (1_770_000, "ends in its header: entry "),
        (1_800_000, "its table of tensors needs 98,362,432: 96,562,432 are missing, from tensor "),
        (98_362_431, "it has 98,362,431 bytes, its table of tensors needs 98,362,432: 1 are missing"),
    ],
)
def test_a_truncated_file_is_rejected_with_figures(smollm2: Path, tmp_path: Path, length: int, expected: str) -> None:
    assert expected in reason(copy(smollm2, tmp_path / "cut.gguf", length))


def test_an_impossible_number_of_layers_is_rejected(make_gguf: MakeGguf) -> None:
    def setup(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(2**32 - 1)
        writer.add_head_count(8)

    assert "4,294,967,295 layers" in reason(make_gguf(setup=setup))


def test_a_file_longer_than_its_tensor_table_is_complete(smollm2: Path, tmp_path: Path) -> None:
    longer = copy(smollm2, tmp_path / "longer.gguf", 98_362_432)
    with longer.open("ab") as file:
        file.write(b"\0" * 100)
    assert header.read(longer).tensor_bytes == header.read(smollm2).tensor_bytes


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\0" * 4096, r"begins with b'\x00\x00\x00\x00' instead of b'GGUF'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>sign in</html>", "a web page"),
        (b"PK\x03\x04" + b"\0" * 60, "a ZIP archive or a PyTorch file"),
        (b"lmgg" + b"\0" * 60, "GGML file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1 of the format; versions 2 and 3 are supported"),
        (b"GGUF" + struct.pack("<IQQ", 77, 0, 0), "version 77"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "does not name its architecture"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "says that it has 1,152,921,504,606,846,976 keys"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "says that it has 1,152,921,504,606,846,976 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**16), "ends in its header: key 1 of"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**40), "has a name of 1,099,511,627,776 bytes"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 99), "is of type 99"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 9, 1), "is a list of type 9"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 4, 2**61), "ends in its header"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 8, 2**61), "ends in its header"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + (struct.pack("<Q", 1) + b"k" + struct.pack("<IB", 0, 1)) * 2,
            "twice",
        ),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<I", 9), "has 9 dimensions"),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQIQ", 1, 32, 999, 0),
            "is of type 999, which this version does not know",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQIQ", 1, 31, 2, 0),
            "does not fit the blocks of Q4_0 (32 values)",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQIQ", 1, 32, 0, 64),
            "begins at 64, the previous one ends at 0",
        ),
    ],
)
def test_another_format_is_rejected_by_name(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "strange.gguf"
    path.write_bytes(content)
    assert expected in reason(path)


def test_a_header_above_the_limit_is_not_read_further(tmp_path: Path) -> None:
    """A sparse file of 1 GiB, which reads as empty strings, is rejected without reading it completely."""
    path = tmp_path / "hole.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 0, 2**29))
        file.truncate(2**30)
    assert "longer than 134,217,728 bytes" in reason(path)


def test_a_file_that_does_not_exist_is_missing_and_not_damaged(tmp_path: Path) -> None:
    with pytest.raises(ModelFileMissing, match="there is no file"):
        header.read(tmp_path / "none.gguf")
    assert reason(tmp_path) == "it is a folder, not a regular file"


def test_lists_by_layer_are_kept_and_long_lists_are_skipped(make_gguf: MakeGguf) -> None:
    def setup(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(3)
        writer.add_head_count([8, 0, 8])
        writer.add_head_count_kv([2, 0, 2])
        writer.add_embedding_length(256)
        writer.add_expert_count(64)
        writer.add_expert_used_count(4)
        writer.add_sliding_window(512)
        writer.add_key_length(48)
        writer.add_array("long.list", list(range(5000)))
        writer.add_token_list(["a", "ü", "c"])
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)

    read = header.read(make_gguf(setup=setup))
    assert (read.heads, read.kv_heads, read.layers) == ((8, 0, 8), (2, 0, 2), 3)
    assert (read.key_length, read.value_length) == (48, 32)
    assert (read.experts, read.experts_used, read.sliding_window) == (64, 4, 512)
    assert (read.vocabulary, read.quantisation) == (3, "Q4_K_M")
    assert "long.list" not in read.metadata
    assert "tokenizer.ggml.tokens" not in read.metadata


def test_a_model_without_a_name_has_the_name_of_its_file(make_gguf: MakeGguf) -> None:
    read = header.read(make_gguf("Some-Model.gguf"))
    assert (read.name, read.quantisation, read.layers, read.heads) == ("Some-Model", "F32", None, ())


def split(make_gguf: MakeGguf, count: int, total: int | None = None) -> list[Path]:
    def part(number: int) -> Path:
        def setup(writer: gguf.GGUFWriter) -> None:
            writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_NO, number)
            writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, count)
            writer.add_int32(gguf.Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, 2 * count if total is None else total)

        return make_gguf(f"m-{number + 1:05}-of-{count:05}.gguf", tensors=2, setup=setup)

    return [part(number) for number in range(count)]


def test_a_split_model_is_read_as_one_model(make_gguf: MakeGguf) -> None:
    parts = split(make_gguf, 3)
    read = header.read(parts[0])
    assert read.parts == tuple(parts)
    assert len(read.tensors) == 6
    assert read.file_bytes == sum(part.stat().st_size for part in parts)


def test_a_missing_part_of_a_split_model_is_named(make_gguf: MakeGguf) -> None:
    parts = split(make_gguf, 3)
    parts[1].unlink()
    with pytest.raises(ModelFileMissing, match=r"has 3 parts, but its folder lacks m-00002-of-00003\.gguf"):
        header.read(parts[0])


def test_a_damaged_part_is_named(make_gguf: MakeGguf) -> None:
    parts = split(make_gguf, 2)
    parts[1].write_bytes(parts[1].read_bytes()[:-1])
    with pytest.raises(ModelFileDamaged) as caught:
        header.read(parts[0])
    assert caught.value.path == parts[1]


def test_a_single_part_is_not_a_model(make_gguf: MakeGguf) -> None:
    parts = split(make_gguf, 2)
    assert reason(parts[1]) == "it is part 2 of 2; name the first part"
    renamed = parts[0].rename(parts[0].with_name("renamed.gguf"))
    assert "its name does not end in -00001-of-00002.gguf" in reason(renamed)
    header.check(parts[1])


def test_parts_of_another_model_are_rejected(make_gguf: MakeGguf) -> None:
    assert "says that the model has 9 tensors, but its 2 parts have 4" in reason(split(make_gguf, 2, total=9)[0])


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_corrupt_header_is_read_or_rejected_and_raises_nothing_else(
    make_gguf: MakeGguf, tmp_path: Path, data: st.DataObject
) -> None:
    def setup(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(2)
        writer.add_head_count([1, 2])
        writer.add_chat_template("{{ messages }}")
        writer.add_token_list(["a", "b"])

    whole = bytearray(make_gguf(tensors=2, rows=1, setup=setup).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(4, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "corrupt.gguf"
    path.write_bytes(whole)
    with contextlib.suppress(ModelFileDamaged, ModelFileMissing):
        header.read(path)

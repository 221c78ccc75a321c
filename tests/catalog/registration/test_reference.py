"""Tests of what users type to name the file of a model, and of the choice among the files of a repository."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.catalog.registration.reference import (
    HubReference,
    PathReference,
    Reference,
    UrlReference,
    choose,
    parse,
    quantisation_of,
)
from app.kernel.errors import InvalidInput

PART = "x-Q8_0-00001-of-00002.gguf"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf.co/Qwen/Qwen3-4B-GGUF", HubReference("Qwen/Qwen3-4B-GGUF")),
        ("hf.co/Qwen/Qwen3-4B-GGUF:Q8_0", HubReference("Qwen/Qwen3-4B-GGUF", "Q8_0")),
        ("https://huggingface.co/Qwen/Qwen3-4B-GGUF/", HubReference("Qwen/Qwen3-4B-GGUF")),
        ("https://hf.co/Qwen/Qwen3-4B-GGUF:q8_0", HubReference("Qwen/Qwen3-4B-GGUF", "q8_0")),
        ("https://huggingface.co/a/b/tree/main", HubReference("a/b")),
        ("https://huggingface.co/a/b/blob/v2/x.gguf", HubReference("a/b", file="x.gguf", revision="v2")),
        (
            "https://huggingface.co/a/b/resolve/main/BF16/x.gguf?download=true",
            HubReference("a/b", file="BF16/x.gguf"),
        ),
        ("hf.co/a/b/Q8_0/x-Q8_0-00002-of-00002.gguf", HubReference("a/b", file=f"Q8_0/{PART}")),
        ("https://mirror.example:8443/a/b:Q4_0", HubReference("a/b", "Q4_0")),
        ("https://example.com/files/x.gguf?token=1", UrlReference("https://example.com/files/x.gguf?token=1")),
        (
            "http://example.com/x-Q8_0-00002-of-00002.gguf?x-Q8_0",
            UrlReference(f"http://example.com/{PART}?x-Q8_0"),
        ),
        ("/data/x.gguf", PathReference(Path("/data/x.gguf"))),
        ("/data/x-Q8_0-00002-of-00002.gguf", PathReference(Path("/data") / PART)),
        ("x.GGUF", PathReference(Path.cwd() / "x.GGUF")),
        ("~/x.gguf", PathReference(Path.home() / "x.gguf")),
        ("qwen3:4b", None),
        ("none", None),
        ("", None),
    ],
)
def test_each_form_is_understood(text: str, expected: Reference | None) -> None:
    assert parse(text, "https://mirror.example:8443") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hf.co/only-a-user", "there is no repository; accepted: hf.co/USER/REPO"),
        ("hf.co/a/../b", "not a repository"),
        ("hf.co/a/b/readme.md", "does not end in .gguf"),
        ("hf.co/a/b:", "'' is not a quantisation"),
        ("hf.co/a/b:Q4 K M", "not a quantisation"),
        ("https://example.com/index.html", "does not end in the name of a .gguf file"),
        ("ftp://example.com/x.gguf", "the scheme 'ftp' is not supported"),
        ("/data/folder", "not the path of a .gguf file"),
        ("hf.co/a/b\x1b[31m", "control characters"),
        ("http://[", "not a URL"),
        ("[", "not a URL"),
        ("~no-such-user/x.gguf", "home directory"),
        ("hf.co/" + "a" * 3000, "too long"),
    ],
)
def test_a_mistake_is_named_with_what_is_accepted(text: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse(text)
    assert message in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "tag"),
    [
        ("Qwen3-4B-Q4_K_M.gguf", "Q4_K_M"),
        ("model.q8_0.gguf", "Q8_0"),
        ("Llama-4-UD-IQ2_XXS-00001-of-00003.gguf", "UD-IQ2_XXS"),
        ("gpt-oss-20b-MXFP4.gguf", "MXFP4"),
        ("BF16/model-BF16-00001-of-00002.gguf", "BF16"),
        ("model-fp16.gguf", "F16"),
        ("model-f32.gguf", "F32"),
        ("Qwen3-4B.gguf", None),
    ],
)
def test_the_quantisation_is_read_from_the_name(file: str, tag: str | None) -> None:
    assert quantisation_of(file) == tag


FILES = [
    "README.md",
    "x-Q4_K_M.gguf",
    "x-Q8_0-00001-of-00002.gguf",
    "x-Q8_0-00002-of-00002.gguf",
    "mmproj-x-F16.gguf",
    "x-imatrix.gguf",
    "F16/x-F16.gguf",
]


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        (HubReference("a/b"), "x-Q4_K_M.gguf"),
        (HubReference("a/b", "q8_0"), "x-Q8_0-00001-of-00002.gguf"),
        (HubReference("a/b", "F16"), "F16/x-F16.gguf"),
        (HubReference("a/b", file="F16/x-F16.gguf"), "F16/x-F16.gguf"),
    ],
)
def test_a_file_is_chosen_by_quantisation_or_name(reference: HubReference, expected: str) -> None:
    assert choose(reference, FILES) == expected


def test_the_only_file_needs_no_quantisation() -> None:
    assert choose(HubReference("a/b"), ["README.md", "some.gguf"]) == "some.gguf"


@pytest.mark.parametrize(
    ("reference", "files", "message"),
    [
        (HubReference("a/b", "Q2_K"), FILES, "the quantisation Q2_K; accepted: hf.co/a/b:F16, hf.co/a/b:Q4_K_M"),
        (HubReference("a/b"), ["x-Q2_K.gguf", "Q3_K.gguf"], "with Q4_K_M; choose another; accepted: hf.co/a/b:Q2_K"),
        (HubReference("a/b"), ["x-Q4_K_M.gguf", "y-Q4_K_M.gguf"], "2 files have the quantisation Q4_K_M"),
        (HubReference("a/b", file="z.gguf"), FILES, "no such file; accepted: x-Q4_K_M.gguf"),
        (HubReference("a/b"), ["model.safetensors"], "this repository has no GGUF file"),
        (HubReference("a/b"), [f"x-Q2_K-{n}x.gguf" for n in range(99)], "and 69 more"),
    ],
)  # fmt: skip
def test_a_file_that_there_is_not_is_answered_with_those_that_there_are(
    reference: HubReference, files: list[str], message: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        choose(reference, files)
    assert message in str(caught.value)


@given(st.one_of(st.text(), st.text().map("hf.co/{}".format), st.text().map("https://hf.co/a/b{}".format)))
def test_no_text_breaks_the_parser(text: str) -> None:
    with contextlib.suppress(InvalidInput):
        parse(text)
    with contextlib.suppress(InvalidInput):
        parse(f"https://{text}/x.gguf", "https://mirror.example")

"""Profiles: a model's family is detected from its header alone, and the catalogue comes first."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from pydantic import ValidationError

from app.catalog import header
from app.catalog.model import SHIPPED_TEMPLATES, PromptProfile
from app.catalog.profiles.families import FAMILIES, MARKS
from app.catalog.profiles.family import RecommendedSampling
from app.catalog.profiles.resolution import ModelProfile, facts_of, resolve
from app.inference.recommended import RECOMMENDABLE, applied
from app.inference.requests import Sampling
from workers.engine.chat.templates import SHIPPED

MakeGguf = Callable[..., Path]

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"


def resolved(
    make_gguf: MakeGguf, architecture: str, template: str, *, numbers: Any = None, **entry: Any
) -> ModelProfile:
    """The profile of a file that a script makes; `numbers` are keys of its header."""

    def setup(writer: gguf.GGUFWriter) -> None:
        writer.add_name("A model")
        if template:
            writer.add_chat_template(template)
        for key, value in (numbers or {}).items():
            (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)

    prompt = PromptProfile(**entry)
    # The name of the file is that of another family.
    path = make_gguf("gemma-3-deepseek-r1-gpt-oss.gguf", architecture=architecture, setup=setup)
    return resolve(prompt, facts_of(header.read(path), prompt))


@pytest.mark.parametrize(
    ("architecture", "template", "name"),
    [
        ("qwen3", CHATML + "{% if enable_thinking %}<think></think>{% endif %}<tool_call>", "qwen3"),
        ("qwen3moe", CHATML + "<tool_call></think>", "qwen3-instruct"),
        ("qwen3moe", CHATML + "{{ '<|im_start|>assistant\\n<think>\\n' }}</think><tool_call>", "qwen3-thinking"),
        ("qwen3moe", CHATML + "<tool_call><function=", "qwen3-coder"),
        ("qwen2", CHATML + "You are Qwen, created by Alibaba Cloud.<tool_call>", "qwen2.5"),
        ("qwen2", CHATML + "<tool_call>{{ '<think>' }}</think>", "qwq"),
        ("qwen2", "<\uff5cUser\uff5c><\uff5cAssistant\uff5c><think>\\n</think>", "deepseek-r1"),
        ("llama", "<\uff5cUser\uff5c><\uff5cAssistant\uff5c><think>\\n</think>", "deepseek-r1"),
        ("llama", "<|start_header_id|>{{ tools }}{{- '\"parameters\": ' }}", "llama3.1"),
        ("llama", "<|start_header_id|>", "llama3"),
        ("gemma3", "<start_of_turn>", "gemma3"),
        ("phi3", "<|user|><|end|><|assistant|>", "phi3"),
        ("phi3", "<|im_start|><|im_sep|>", "phi4"),
        ("qwen2", CHATML, "none"),
        ("llama", CHATML, "none"),
        ("falcon", "<start_of_turn>", "none"),
        ("smollm3", "<think></think>", "thinking"),
        ("llama", "", "none"),
    ],
)
def test_the_header_says_the_family(make_gguf: MakeGguf, architecture: str, template: str, name: str) -> None:
    found = resolved(make_gguf, architecture, template)
    assert found.name == name
    assert found.reason


def test_the_catalogue_names_a_profile_or_none(make_gguf: MakeGguf) -> None:
    qwen = CHATML + "enable_thinking<tool_call></think>"
    assert resolved(make_gguf, "qwen3", qwen, profile="llama3").reason == "named in the catalogue"
    none = resolved(make_gguf, "qwen3", qwen, profile="none", numbers={"general.sampling.temp": 0.3})
    assert (none.name, none.thinking, none.sampling()) == ("none", None, RecommendedSampling())
    assert none.tools == "hermes", "calls are recognised in the template, as always"
    shipped = resolved(make_gguf, "llama", "<|start_header_id|>", chat_template="llama3")
    assert shipped.name == "none"
    with pytest.raises(ValidationError, match=r"'qwen4' is no profile; accepted are none, .*qwen3"):
        PromptProfile(profile="qwen4")
    assert set(SHIPPED_TEMPLATES) == set(SHIPPED)


def test_the_sampling_is_that_of_the_entry_then_the_file_then_the_family(make_gguf: MakeGguf) -> None:
    numbers = {"general.sampling.temp": 0.3, "general.sampling.top_p": 0.7}
    found = resolved(make_gguf, "gemma3", "<start_of_turn>", numbers=numbers, sampling={"top_p": 0.5})
    assert found.sampling().shown() == {"temperature": 0.3, "top_p": 0.5, "top_k": 64}


def test_without_thinking_qwen3_is_sampled_as_its_publisher_says(make_gguf: MakeGguf) -> None:
    """A file has the numbers of the thinking mode only."""
    template = CHATML + "enable_thinking<tool_call></think>"
    found = resolved(make_gguf, "qwen3", template, numbers={"general.sampling.temp": 0.6})
    assert found.sampling().shown() == {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0}
    assert found.sampling(thinks=False).shown() == {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1e30, "much", ""])
def test_a_file_with_impossible_sampling_changes_nothing(make_gguf: MakeGguf, value: Any) -> None:
    numbers = {"general.sampling.temp": value, "general.sampling.top_k": value, "general.sampling.min_p": 0.25}
    assert resolved(make_gguf, "llama", CHATML, numbers=numbers).sampling().shown() == {"min_p": 0.25}


def test_names_are_unique_and_every_family_can_be_named() -> None:
    assert len(FAMILIES) == len(MARKS)
    for name in FAMILIES:
        assert PromptProfile(profile=name).profile == name


def test_the_client_always_wins() -> None:
    published = RecommendedSampling(temperature=0.6, top_p=0.95, top_k=20, repeat_penalty=1.05)
    free = applied(Sampling(unset=RECOMMENDABLE), published)
    assert (free.temperature, free.top_p, free.top_k, free.min_p, free.repeat_penalty) == (0.6, 0.95, 20, 0.05, 1.05)
    own = applied(Sampling(temperature=0.8, unset=RECOMMENDABLE - {"temperature"}), published)
    assert (own.temperature, own.top_k) == (0.8, 20)
    greedy = Sampling(temperature=0, unset=RECOMMENDABLE - {"temperature"})
    assert applied(greedy, published) == greedy, "no penalty changes the likeliest text"
    assert applied(Sampling(), published) == Sampling(), "what a program set whole is not changed"


def test_the_tables_of_the_documentation_are_those_of_the_code() -> None:
    """Each family is described, and each number that is recommended."""
    page = (Path(__file__).parents[3] / "docs/profiles.md").read_text()
    table = page.split("## Thinking")[0]
    assert set(re.findall(r"^\| `([\w.-]+)` \|", table, re.MULTILINE)) == set(FAMILIES)
    columns = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty")
    told: dict[str, dict[str, float]] = {}
    for line in page.split("## Recommended sampling")[1].splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 7:
            values = {name: float(cell) for name, cell in zip(columns, cells[1:6], strict=True) if cell}
            told |= {part.strip().replace("`", ""): values for part in cells[0].split(",")}
    expected = {
        family.name: {name: float(value) for name, value in family.sampling.shown().items()}
        for family in FAMILIES.values()
        if family.sampling.shown()
    }
    plain = FAMILIES["qwen3"].sampling_unthinking
    assert plain is not None
    assert told == expected | {"qwen3 switched off": {name: float(value) for name, value in plain.shown().items()}}

"""Hooks in settings: what is refused, what applies to which request, and in which order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.inference.hooks import selection, shipped
from app.inference.hooks.exchange import HookMisbehaved, HookText, answer_of, of_request, with_request
from app.inference.hooks.selection import HookTarget
from app.inference.requests import ChatMessage, GenerateRequest, ToolCall
from app.kernel import settings
from app.kernel.errors import InvalidSettings
from app.kernel.sections.hooks import HookDefinition, HookPoint


def load(tmp_path: Path, text: str) -> settings.Settings:
    file = tmp_path / "arriero.toml"
    file.write_text(text)
    return settings.load(environment={}, config=file).settings


def test_hooks_are_read_from_the_file_and_reach_child_processes(tmp_path: Path) -> None:
    found = load(tmp_path, '[[hooks]]\nname = "pii"\nkind = "pii"\ntimeout = "2s"\noptions = { region = "DE" }\n')
    assert [hook.name for hook in found.hooks] == ["pii"]
    again = settings.load(environment=settings.environment_of(found)).settings
    assert again.hooks == found.hooks


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ('name = "X"\nkind = "pii"', "name"),
        ('name = "x"\nkind = "magic"', "kind"),
        ('name = "x"\nkind = "python"', "entry_point"),
        ('name = "x"\nkind = "http"\nurl = "ftp://a"', "https://"),
        ('name = "x"\nkind = "http"\nurl = "https://u:p@a.b"', "password"),
        ('name = "x"\nkind = "http"\nurl = "https://a.b/?key=1"', "query"),
        ('name = "x"\nkind = "pii"\nurl = "https://a.b"', "url"),
        ('name = "x"\nkind = "pii"\ntimeout = "2m"', "at most 1m"),
        ('name = "x"\nkind = "pii"\non_failure = "maybe"', "open or closed"),
        ('name = "x"\nkind = "pii"\nspeed = 1', "speed"),
        ('name = "x"\nkind = "pii"\nmodels = []', "models"),
        ('name = "x"\nkind = "pii"\n[[hooks]]\nname = "x"\nkind = "words"', "two hooks"),
    ],
)
def test_a_wrong_hook_is_refused_with_its_place(tmp_path: Path, fields: str, problem: str) -> None:
    with pytest.raises(InvalidSettings, match="hooks") as caught:
        load(tmp_path, f"[[hooks]]\n{fields}\n")
    assert problem in str(caught.value)


def test_options_of_shipped_hooks_are_checked_at_the_start(tmp_path: Path) -> None:
    found = load(tmp_path, '[[hooks]]\nname = "x"\nkind = "words"\noptions = { action = "hide" }\n')
    with pytest.raises(InvalidSettings, match=r"hooks\[0\]: hook x: options\.action"):
        shipped.require_options(found.hooks)


def test_hooks_apply_by_model_workflow_and_namespace_in_their_order() -> None:
    of = [
        HookDefinition(name="late", kind="words", order=5),
        HookDefinition(name="qwen", kind="words", models=("qwen*",), order=1),
        HookDefinition(name="team", kind="words", namespaces=("team-?", "a.b"), workflows=("mail",)),
    ]

    def names(model: str, workflow: str = "mail", namespace: str = "team-?") -> list[str]:
        return [hook.name for hook in selection.selected(of, HookTarget(model, workflow, namespace))]

    assert names("qwen3:8b") == ["team", "qwen", "late"]
    assert names("xqwen") == ["team", "late"]
    assert names("qwen", workflow="mails") == ["qwen", "late"]
    assert names("m", namespace="team-x") == ["late"], "only * is an operator"
    assert names("m", namespace="a.b") == ["team", "late"]
    both = selection.selected(of, HookTarget("qwen", "mail", "a.b"))
    assert [hook.name for hook in selection.at(both, HookPoint.POST_RESULT)] == ["late", "qwen", "team"]


@pytest.mark.parametrize(
    "answer",
    [
        "yes",
        [1],
        {"refused": "x"},
        {"refuse": ""},
        {"refuse": "x" * 501},
        {"texts": "x"},
        {"texts": [{"text": 1}]},
        {"annotations": {"a": {"b": 1}}},
        {"annotations": {"a": "x" * 201}},
        {"annotations": {"a\0": 1}},
        {"annotations": {"a": float("nan")}},
        {"annotations": {"a": 1 << 70}},
        {"annotations": {str(i): 1 for i in range(21)}},
        {"state": "x" * 1_000_001},
        {"state": {1, 2}},
    ],
)
def test_an_answer_of_another_form_is_refused_without_a_quote(answer: Any) -> None:
    with pytest.raises(HookMisbehaved) as caught:
        answer_of(answer)
    assert len(str(caught.value)) < 400


def test_a_hook_changes_texts_and_nothing_else() -> None:
    said = ChatMessage("assistant", "a", (ToolCall("send", {"to": "b"}, '{"to":"b"}'),))
    request = GenerateRequest(messages=(ChatMessage("user", "hi"), said), prefill="So")
    texts = of_request(request)
    assert with_request(request, texts) == request
    changed = [one.model_copy(update={"text": "x"}) for one in texts]
    after = with_request(request, changed)
    assert [one.content for one in after.messages] == ["x", "x"]
    assert (after.prefill, after.messages[1].tool_calls) == ("x", said.tool_calls)
    lies: list[list[HookText]] = [
        texts[:-1],
        [*texts, texts[0]],
        [texts[0].model_copy(update={"role": "system"}), *texts[1:]],
        [texts[0], HookText(text="a"), texts[2]],
        [texts[0].model_copy(update={"text": "x" * 8_000_001}), *texts[1:]],
    ]
    for lie in lies:
        with pytest.raises(HookMisbehaved):
            with_request(request, lie)

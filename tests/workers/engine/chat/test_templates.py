"""Chat templates: the same tokens as llama.cpp, and no control tokens from texts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.catalog.model import PromptProfile
from app.inference.requests import ChatMessage, GenerateRequest, Tool
from app.kernel.errors import FailureReason, ModelUnsupported, StepFailure
from workers.engine.chat.templates import SHIPPED, ChatTemplate
from workers.engine.engine import LlamaEngine

SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>"]
PARTS = ["<", "|im_", "end|>", "<|im_", "start|>", "a ", "\ufdd0", "\ufdd1"]


def of(*texts: str) -> GenerateRequest:
    return GenerateRequest(messages=tuple(ChatMessage("user", text) for text in texts))


def controls(engine: LlamaEngine, tokens: tuple[int, ...]) -> list[int]:
    return [token for token in tokens if token in engine.model.control_tokens]


@pytest.fixture(scope="module")
def template(shared: LlamaEngine) -> ChatTemplate:
    return ChatTemplate(shared.model, PromptProfile())


def test_an_ordinary_prompt_has_the_tokens_of_llama_cpp(shared: LlamaEngine, template: ChatTemplate) -> None:
    text = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi  there\n<b>ü</b><|im_end|>\n<|im_start|>assistant\n"
    )
    assert list(template.prompt(of("Hi  there\n<b>ü</b>")).tokens) == shared.model.tokenize(
        text, add_special=True, parse_special=True
    )


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(
        st.lists(st.sampled_from([*SPECIALS, *PARTS]), max_size=8).map("".join),
        min_size=1,
        max_size=3,
    )
)
def test_texts_cannot_inject_control_tokens(shared: LlamaEngine, template: ChatTemplate, texts: list[str]) -> None:
    expected = controls(shared, template.prompt(of(*("x" for _ in texts))).tokens)
    tokens = template.prompt(of(*texts)).tokens
    assert controls(shared, tokens) == expected
    written = b"".join(shared.model.piece(token, special=True) for token in tokens).decode()
    for text in texts:
        assert text in written


def test_tools_and_prefills_cannot_inject_control_tokens(shared: LlamaEngine) -> None:
    template = ChatTemplate(shared.model, PromptProfile(chat_template="{{ tools | tojson }}{{ messages[0].content }}"))
    tool = Tool("x<|im_end|>", "<|im_start|>", {"type": "object", "<|im_end|>": ["<|im_end|>", {"a": "<|im_start|>"}]})
    request = GenerateRequest(messages=(ChatMessage("user", "a"),), tools=(tool,), prefill="<|im_end|>")
    assert controls(shared, template.prompt(request).tokens) == []


def test_a_prompt_without_messages_cannot_inject_control_tokens(shared: LlamaEngine, template: ChatTemplate) -> None:
    assert controls(shared, template.prompt(GenerateRequest(prompt="".join(SPECIALS))).tokens) == []


def test_a_template_cannot_leave_its_sandbox(shared: LlamaEngine) -> None:
    for source in (
        "{{ messages.__class__.__mro__ }}",
        "{% for x in range(10**9) %}{% endfor %}",
        "{{ raise_exception('only users') }}",
        "{{ messages[7].content }}",
        "{{ nothing.at.all }}",
    ):
        with pytest.raises(StepFailure) as caught:
            ChatTemplate(shared.model, PromptProfile(chat_template=source)).prompt(of("a"))
        assert caught.value.reason is FailureReason.TEMPLATE_ERROR, source
    with pytest.raises(ModelUnsupported):
        ChatTemplate(shared.model, PromptProfile(chat_template="{% for %}"))


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_templates_render(shared: LlamaEngine, name: str) -> None:
    template = ChatTemplate(shared.model, PromptProfile(chat_template=name, default_system="Be kind.", stop=("###",)))
    prompt = template.prompt(of("one", "two"))
    written = b"".join(shared.model.piece(token, special=True) for token in prompt.tokens).decode()
    assert written.index("Be kind.") < written.index("one") < written.index("two")
    assert prompt.stop == ("###",)


def test_a_template_without_a_system_role_gets_the_system_message_in_the_user_message(shared: LlamaEngine) -> None:
    source = "{% for m in messages %}[{{ m.role }}|{{ m.content }}]{% endfor %}"
    template = ChatTemplate(shared.model, PromptProfile(chat_template=source, system="user"))
    request = GenerateRequest(
        messages=(ChatMessage("system", "Be brief."), ChatMessage("user", "Hi"), ChatMessage("user", "Ho"))
    )

    written = b"".join(shared.model.piece(token, special=True) for token in template.prompt(request).tokens).decode()
    assert written == "[user|Be brief.\n\nHi][user|Ho]"

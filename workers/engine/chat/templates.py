"""
Chat templates: rendering messages and tools into the tokens of a prompt.

The model's own Jinja template runs in a sandbox. Messages and tools cannot inject control tokens: where a text spells
one, a mark is put between its characters before the template runs, so the template cannot assemble it by cutting or
joining. Marked characters are tokenised as plain text.
Ordinary texts are tokenised exactly as llama.cpp does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from app.catalog.model import PromptProfile
from app.inference.requests import ChatMessage, GenerateRequest
from app.kernel import clock
from app.kernel.errors import FailureReason, ModelUnsupported, StepFailure
from workers.engine.bindings.llama import LlamaModel
from workers.engine.chat import calls
from workers.engine.chat.calls import ToolCallStyle

#: Unicode non-characters, which ordinary texts do not contain. One of them marks spelled-out control tokens.
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]

#: Templates for models whose file has none.
SHIPPED: Mapping[str, str] = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}{% else %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
        "{{ ns.system if m.role != 'assistant' }}{{ m.content | trim }}<end_of_turn>\n"
        "{% if m.role != 'assistant' %}{% set ns.system = '' %}{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "plain": (
        "{{ bos_token }}{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenised prompt."""

    tokens: tuple[int, ...]
    #: Texts that end the answer, beyond those of the request.
    stop: tuple[str, ...] = ()


def _merge_system(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Merge system messages into the first user message."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    first = next((i for i, message in enumerate(others) if message["role"] == "user"), None)
    if not system:
        return others
    if first is None:
        return [{"role": "user", "content": "\n\n".join(system)}, *others]
    merged = {"role": "user", "content": "\n\n".join([*system, others[first]["content"]])}
    return [*others[:first], merged, *others[first + 1 :]]


class ChatTemplate:
    """The chat template of one model. Safe from any thread."""

    def __init__(self, model: LlamaModel, profile: PromptProfile) -> None:
        """Raises ModelUnsupported when the template is not valid Jinja."""
        self._model, self._profile = model, profile
        template = profile.chat_template
        self.source = SHIPPED.get(template, template) if template is not None else model.chat_template()
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._bos = model.piece(model.bos, special=True).decode("utf-8", "replace") if model.bos >= 0 else ""
        self._eos = model.piece(model.eos, special=True).decode("utf-8", "replace") if model.eos >= 0 else ""
        try:
            self._template = environment.from_string(self.source) if self.source else None
        except TemplateSyntaxError as error:
            raise ModelUnsupported(model.path, f"its chat template is not valid Jinja: {error}") from error
        spelled = {model.piece(token, special=True).decode("utf-8", "replace") for token in model.control_tokens}
        longest_first = sorted((text for text in spelled if len(text) > 1), key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        #: The style of the model's tool calls: from the profile, or recognised in the template.
        self.tools: ToolCallStyle | None = profile.tools or _tool_style(self.source or "")
        #: The template does not support tools: they are described in a system message.
        self._describes_tools = not re.search(r"\btools\b", self.source or "")

    def prompt(self, request: GenerateRequest) -> Prompt:
        """Render the prompt of a request. Raises StepFailure when the template fails or the model has none."""
        if request.prompt is not None:
            return Prompt(
                tuple(self._model.tokenize(request.prompt, add_special=True, parse_special=False)), self._profile.stop
            )
        if self._template is None:
            raise StepFailure(
                FailureReason.TEMPLATE_ERROR,
                f"{self._model.path.name} has no chat template; set one in the model's profile "
                f"(Jinja source, or one of {', '.join(SHIPPED)}), or send a prompt instead of messages",
            )
        tools_text = json.dumps([calls.template_tool(tool) for tool in request.tools], ensure_ascii=False)
        arguments = [dict(call.arguments) for message in request.messages for call in message.tool_calls]
        calls_text = json.dumps(arguments, ensure_ascii=False)
        mark = _unused_mark(*(message.content for message in request.messages), request.prefill, tools_text, calls_text)
        messages, tools = request.messages, () if request.tool_choice == "none" else request.tools
        default = self._profile.default_system
        if default is not None and not any(message.role == "system" for message in messages):
            messages = (ChatMessage("system", default), *messages)
        if self._describes_tools and self.tools is not None:
            messages, tools = calls.describe_tools(messages, tools, self.tools), ()
        rendered = [self._rendered(message, mark) for message in messages]
        if self._profile.system == "user":
            rendered = _merge_system(rendered)
        try:
            text = self._template.render(
                messages=rendered,
                tools=[self._marked_in(calls.template_tool(tool), mark) for tool in tools] or None,
                add_generation_prompt=True,
                bos_token=self._bos,
                eos_token=self._eos,
                **self._profile.arguments,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
            raise StepFailure(
                FailureReason.TEMPLATE_ERROR, f"the chat template rejects these messages: {error}"
            ) from error
        return Prompt(tuple(self._tokens(text + self._marked(request.prefill, mark), mark)), self._profile.stop)

    def rerank_prompt(self, query: str, document: str) -> list[int]:
        """Return the tokens of a query and a document for a reranker, in the file's own prompt if it has one."""
        source = self._model.chat_template("rerank")
        if source is None:
            return self._model.tokenize_pair(query, document)
        mark = _unused_mark(query, document)
        texts = {"query": self._marked(query, mark), "document": self._marked(document, mark)}
        prompt = re.sub(r"\{(query|document)\}", lambda found: texts[found[1]], source)
        return self._tokens(prompt, mark, add_special=False)

    def _tokens(self, text: str, mark: str, *, add_special: bool = True) -> list[int]:
        """Tokenise a rendered template: its own control tokens are kept, marked ones become plain characters."""
        bos = self._bos if self._model.adds_bos and add_special else ""
        if bos and text.startswith(bos):
            text = text[len(bos) :]  # llama.cpp adds it itself
        tokens: list[int] = []
        for index, part in enumerate(re.split(f"((?:[^{mark}]{mark})+[^{mark}]?)", text)):
            if part or not index:
                first = add_special and not index
                tokens += self._model.tokenize(part.replace(mark, ""), add_special=first, parse_special=not index % 2)
        return tokens

    def _marked(self, text: str, mark: str) -> str:
        """Return the text with a mark between the characters of each control token that it spells."""
        return self._controls.sub(lambda found: mark.join(found[0]), text)

    def _rendered(self, message: ChatMessage, mark: str) -> dict[str, Any]:
        """Return the message in the form that chat templates expect, with control tokens marked."""
        rendered: dict[str, Any] = {"role": message.role, "content": self._marked(message.content, mark)}
        if message.tool_calls:
            functions = [{"name": call.name, "arguments": dict(call.arguments)} for call in message.tool_calls]
            rendered["tool_calls"] = [
                {"type": "function", "function": self._marked_in(function, mark)} for function in functions
            ]
        return rendered

    def _marked_in(self, value: Any, mark: str) -> Any:
        """As `_marked`, for all strings in a JSON value."""
        if isinstance(value, str):
            return self._marked(value, mark)
        if isinstance(value, Mapping):
            return {self._marked(str(key), mark): self._marked_in(item, mark) for key, item in value.items()}
        return [self._marked_in(item, mark) for item in value] if isinstance(value, list | tuple) else value


def _unused_mark(*texts: str) -> str:
    """Return a mark that none of the texts contains. Raises StepFailure when there is none."""
    used = set().union(*texts)
    for mark in _MARKS:
        if mark not in used:
            return mark
    raise StepFailure(
        FailureReason.INVALID_REQUEST, "the texts contain all Unicode non-characters from U+FDD0 to U+FDEF"
    )


def _tool_style(source: str) -> ToolCallStyle | None:
    if "<tool_call>" in source:
        return "hermes"
    if "<|python_tag|>" in source or '"parameters":' in source:
        return "llama3"
    return None


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **_: Any) -> str:
    """Serialise as JSON without HTML escapes, as chat templates expect."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return clock.now().strftime(pattern)

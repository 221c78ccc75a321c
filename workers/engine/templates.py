"""
Chat templates: messages become the tokens of a prompt.

The model's own Jinja is run in a sandbox. Nothing that a message or a tool says can bring in a control token: where a
text spells one, a mark goes between its letters before the template runs, so that no cutting or joining by the template
can put it together; marked letters are tokenised as plain text.
Tokens for ordinary texts are those that llama.cpp itself would give.
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
from workers.engine import calls
from workers.engine.calls import Style
from workers.engine.llama import LlamaModel

#: Non-characters of Unicode, which no honest text holds: one of them marks what a message spelled out.
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
    """A prompt, ready to be computed."""

    tokens: tuple[int, ...]
    #: Texts that end the answer, beyond those of the request.
    stop: tuple[str, ...] = ()


def _without_system(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """System messages put before the first message of the user."""
    told = [message["content"] for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    first = next((i for i, message in enumerate(others) if message["role"] == "user"), None)
    if not told:
        return others
    if first is None:
        return [{"role": "user", "content": "\n\n".join(told)}, *others]
    folded = {"role": "user", "content": "\n\n".join([*told, others[first]["content"]])}
    return [*others[:first], folded, *others[first + 1 :]]


class ChatTemplate:
    """The template of one model. Any thread may use it."""

    def __init__(self, model: LlamaModel, profile: PromptProfile) -> None:
        """Raises ModelUnsupported when the template is no Jinja."""
        self._model, self._profile = model, profile
        wanted = profile.chat_template
        self.source = SHIPPED.get(wanted, wanted) if wanted is not None else model.chat_template()
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _strftime_now
        self._bos = model.piece(model.bos, special=True).decode("utf-8", "replace") if model.bos >= 0 else ""
        self._eos = model.piece(model.eos, special=True).decode("utf-8", "replace") if model.eos >= 0 else ""
        try:
            self._template = environment.from_string(self.source) if self.source else None
        except TemplateSyntaxError as error:
            raise ModelUnsupported(model.path, f"its chat template is no Jinja: {error}") from error
        spelled = {model.piece(token, special=True).decode("utf-8", "replace") for token in model.controls}
        longest_first = sorted((text for text in spelled if len(text) > 1), key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        #: How the model writes tool calls, if it was told how to.
        self.tools: Style | None = profile.tools or _tool_style(self.source or "")
        #: The template does not know of tools: they are told in words.
        self._tells_tools = not re.search(r"\btools\b", self.source or "")

    def prompt(self, request: GenerateRequest) -> Prompt:
        """The prompt of a request. Raises StepFailure when the template refuses it, or there is none."""
        if request.prompt is not None:
            return Prompt(tuple(self._model.tokens(request.prompt, opening=True, special=False)), self._profile.stop)
        if self._template is None:
            raise StepFailure(
                FailureReason.TEMPLATE_ERROR,
                f"{self._model.path.name} has no chat template; give one in the model's profile "
                f"(a Jinja source, or one of {', '.join(SHIPPED)}), or send a bare prompt",
            )
        tools_text = json.dumps([calls.described(tool) for tool in request.tools], ensure_ascii=False)
        asked = [dict(call.arguments) for turn in request.messages for call in turn.tool_calls]
        calls_text = json.dumps(asked, ensure_ascii=False)
        mark = _unused_mark(*(turn.content for turn in request.messages), request.prefill, tools_text, calls_text)
        turns, tools = request.messages, () if request.tool_choice == "none" else request.tools
        default = self._profile.default_system
        if default is not None and not any(turn.role == "system" for turn in turns):
            turns = (ChatMessage("system", default), *turns)
        if self._tells_tools and self.tools is not None:
            turns, tools = calls.in_words(turns, tools, self.tools), ()
        messages = [self._turn(turn, mark) for turn in turns]
        if self._profile.system == "user":
            messages = _without_system(messages)
        try:
            text = self._template.render(
                messages=messages,
                tools=[self._marked_in(calls.described(tool), mark) for tool in tools] or None,
                add_generation_prompt=True,
                bos_token=self._bos,
                eos_token=self._eos,
                **self._profile.arguments,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
            raise StepFailure(
                FailureReason.TEMPLATE_ERROR, f"the chat template refuses these messages: {error}"
            ) from error
        return Prompt(tuple(self._tokens(text + self._marked(request.prefill, mark), mark)), self._profile.stop)

    def pair(self, query: str, document: str) -> list[int]:
        """Tokens of a query and a document that are judged together: in the file's own prompt, where it has one."""
        source = self._model.chat_template("rerank")
        if source is None:
            return self._model.pair(query, document)
        mark = _unused_mark(query, document)
        texts = {"query": self._marked(query, mark), "document": self._marked(document, mark)}
        prompt = re.sub(r"\{(query|document)\}", lambda found: texts[found[1]], source)
        return self._tokens(prompt, mark, opening=False)

    def _tokens(self, text: str, mark: str, *, opening: bool = True) -> list[int]:
        """Tokens of a rendered template: its own control tokens count, the marked ones are letters."""
        bos = self._bos if self._model.adds_bos and opening else ""
        if bos and text.startswith(bos):
            text = text[len(bos) :]  # llama.cpp puts it there itself
        tokens: list[int] = []
        for index, part in enumerate(re.split(f"((?:[^{mark}]{mark})+[^{mark}]?)", text)):
            if part or not index:
                first = opening and not index
                tokens += self._model.tokens(part.replace(mark, ""), opening=first, special=not index % 2)
        return tokens

    def _marked(self, text: str, mark: str) -> str:
        """The text, with a mark between the letters of each control token that it spells."""
        return self._controls.sub(lambda found: mark.join(found[0]), text)

    def _turn(self, turn: ChatMessage, mark: str) -> dict[str, Any]:
        told: dict[str, Any] = {"role": turn.role, "content": self._marked(turn.content, mark)}
        if turn.tool_calls:
            asked = [{"name": call.name, "arguments": dict(call.arguments)} for call in turn.tool_calls]
            told["tool_calls"] = [{"type": "function", "function": self._marked_in(call, mark)} for call in asked]
        return told

    def _marked_in(self, value: Any, mark: str) -> Any:
        """As `_marked`, for all texts in a JSON value."""
        if isinstance(value, str):
            return self._marked(value, mark)
        if isinstance(value, Mapping):
            return {self._marked(str(key), mark): self._marked_in(item, mark) for key, item in value.items()}
        return [self._marked_in(item, mark) for item in value] if isinstance(value, list | tuple) else value


def _unused_mark(*texts: str) -> str:
    """A character that stands in none of the texts. Raises StepFailure when there is none."""
    used = set().union(*texts)
    for mark in _MARKS:
        if mark not in used:
            return mark
    raise StepFailure(FailureReason.INVALID_REQUEST, "the texts hold all the non-characters from U+FDD0 to U+FDEF")


def _tool_style(source: str) -> Style | None:
    if "<tool_call>" in source:
        return "hermes"
    if "<|python_tag|>" in source or '"parameters":' in source:
        return "llama3"
    return None


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **_: Any) -> str:
    """JSON as the authors of chat templates mean it: without escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return clock.now().strftime(pattern)

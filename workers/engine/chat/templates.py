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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from app.catalog.model import PromptProfile
from app.inference.requests import ChatMessage, GenerateRequest, Pixels
from app.kernel import clock
from app.kernel.errors import FailureReason, ModelUnsupported, StepFailure
from workers.engine.bindings.llama import LlamaModel
from workers.engine.chat import calls
from workers.engine.chat.calls import ToolCallStyle
from workers.engine.vision.image_spans import ImageChunk, ImageSpan
from workers.engine.vision.projector import PreparedImage

#: Unicode non-characters, which ordinary texts do not contain. One of them marks spelled-out control tokens.
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]

#: What a template raises that does not suit the messages.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, OverflowError)
#: A text by which it is seen what a template reads.
_PROBE = "arriero-probe"

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
    #: The places of images; their entries in `tokens` are no tokens.
    images: tuple[ImageSpan, ...] = ()


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
        #: The template reads contents as lists of parts, and would write nothing of a text.
        self._wants_parts = self._template is not None and not self._writes(_PROBE) and self._writes(_parts(_PROBE))

    def _writes(self, content: object) -> bool:
        """Whether the template writes the text of a message with this content."""
        assert self._template is not None, "it is called for one"
        message = {"role": "user", "content": content}
        values = {"bos_token": self._bos, "eos_token": self._eos, **self._profile.arguments}
        try:
            return _PROBE in self._template.render(messages=[message], tools=None, add_generation_prompt=True, **values)
        except _TEMPLATE_ERRORS:
            return False

    def prompt(self, request: GenerateRequest, prepare: Callable[[Pixels], PreparedImage] | None = None) -> Prompt:
        """
        Render the prompt of a request; `prepare` makes the entries of images.

        Raises StepFailure when the template fails or the model has none, or an image cannot be prepared.
        """
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
        mark, place = _unused_marks(
            *(message.content for message in request.messages), request.prefill, tools_text, calls_text
        )
        messages, tools = request.messages, () if request.tool_choice == "none" else request.tools
        default = self._profile.default_system
        if default is not None and not any(message.role == "system" for message in messages):
            messages = (ChatMessage("system", default), *messages)
        if self._describes_tools and self.tools is not None:
            messages, tools = calls.describe_tools(messages, tools, self.tools), ()
        rendered, number = [], 0
        for message in messages:
            rendered.append(self._rendered(message, mark, place, number))
            number += len(message.images)
        if self._profile.system == "user":
            rendered = _merge_system(rendered)
        if self._wants_parts:
            rendered = [{**message, "content": _parts(message["content"])} for message in rendered]
        try:
            text = self._template.render(
                messages=rendered,
                tools=[self._marked_in(calls.template_tool(tool), mark) for tool in tools] or None,
                add_generation_prompt=True,
                bos_token=self._bos,
                eos_token=self._eos,
                **self._profile.arguments,
            )
        except _TEMPLATE_ERRORS as error:
            raise StepFailure(
                FailureReason.TEMPLATE_ERROR, f"the chat template rejects these messages: {error}"
            ) from error
        text += self._marked(request.prefill, mark)
        if not request.images:
            return Prompt(tuple(self._tokens(text, mark)), self._profile.stop)
        return self._with_images(request, text, mark, place, prepare)

    def _with_images(
        self,
        request: GenerateRequest,
        text: str,
        mark: str,
        place: str,
        prepare: Callable[[Pixels], PreparedImage] | None,
    ) -> Prompt:
        """Tokenise a rendered template, with the entries of images at their places."""
        images = request.images
        parts = re.split(f"{place}(\\d+){place}", text)
        if sorted(map(int, parts[1::2])) != list(range(len(images))):
            message = f"the chat template of {self._model.path.name} does not write each image of the messages once"
            raise StepFailure(FailureReason.TEMPLATE_ERROR, message)
        tokens: list[int] = []
        spans: list[ImageSpan] = []
        for index, part in enumerate(parts):
            if not index % 2:
                tokens += self._tokens(part, mark, add_special=not index) if part or not index else []
                continue
            image = images[int(part)]
            if prepare is None or image.pixels is None:
                raise StepFailure(
                    FailureReason.INVALID_REQUEST, f"{image.place}: {self._model.path.name} reads no images"
                )
            for entry in prepare(image.pixels).parts:
                if isinstance(entry, ImageChunk):
                    spans.append(ImageSpan(len(tokens), entry))
                    tokens += entry.entries()
                else:
                    tokens += entry
        if not tokens or tokens[-1] < 0:
            raise StepFailure(FailureReason.TEMPLATE_ERROR, "the prompt ends with an image; write a text after it")
        return Prompt(tuple(tokens), self._profile.stop, tuple(spans))

    def rerank_prompt(self, query: str, document: str) -> list[int]:
        """Return the tokens of a query and a document for a reranker, in the file's own prompt if it has one."""
        source = self._model.chat_template("rerank")
        if source is None:
            return self._model.tokenize_pair(query, document)
        mark, _ = _unused_marks(query, document)
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

    def _rendered(self, message: ChatMessage, mark: str, place: str, number: int) -> dict[str, Any]:
        """
        Return the message in the form that chat templates expect, with control tokens marked.

        Its images, which are counted from `number` on, are numbers between two characters `place`.
        """
        content, at = "", 0
        for index, image in enumerate(message.images):
            end = max(at, min(image.at, len(message.content)))
            content += self._marked(message.content[at:end], mark) + f"{place}{number + index}{place}"
            at = end
        content += self._marked(message.content[at:], mark)
        rendered: dict[str, Any] = {"role": message.role, "content": content}
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


def _unused_marks(*texts: str) -> tuple[str, str]:
    """Return two marks that none of the texts contains. Raises StepFailure when there are none."""
    used = set().union(*texts)
    free = [mark for mark in _MARKS if mark not in used]
    if len(free) < 2:
        message = "the texts contain nearly all Unicode non-characters from U+FDD0 to U+FDEF"
        raise StepFailure(FailureReason.INVALID_REQUEST, message)
    return free[0], free[1]


def _parts(content: str) -> list[dict[str, str]]:
    """Return a content as a list of parts."""
    return [{"type": "text", "text": content}]


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

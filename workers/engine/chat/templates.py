"""
Chat templates: rendering messages and tools into the tokens of a prompt.

The model's own Jinja template runs in a sandbox. Messages and tools cannot inject control tokens: where a text spells
one, a mark is put between its characters before the template runs, so the template cannot assemble it by cutting or
joining. Marked characters are tokenised as plain text.
Ordinary texts are tokenised exactly as llama.cpp does.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from app.catalog.model import PromptProfile
from app.catalog.profiles.family import Family, ThinkingTags, ToolCallStyle
from app.catalog.profiles.resolution import SAMPLING_KEYS, FileFacts, resolve
from app.inference.requests import ChatMessage, GenerateRequest, Pixels, ToolCall
from app.kernel import clock
from app.kernel.errors import FailureReason, ModelUnsupported, StepFailure
from workers.engine.bindings.llama import LlamaModel
from workers.engine.chat import calls
from workers.engine.chat.call_forms import render, to_json
from workers.engine.chat.channels import MARKERS, ChannelSplitter
from workers.engine.chat.thinking import AnswerSplitter, ThinkingSplitter
from workers.engine.vision.image_spans import ImageChunk, ImageSpan
from workers.engine.vision.projector import PreparedImage

#: Unicode non-characters, which ordinary texts do not contain. One of them marks spelled-out control tokens.
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]

#: Variables of templates: the switch of thinking, and its level.
_SWITCH, _LEVEL = "enable_thinking", "reasoning_effort"
#: Levels that templates do not have, and those that are nearest.
_LEVELS: Mapping[str, str] = {"none": "low", "minimal": "low", "xhigh": "high"}
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
    #: Whether the answer begins inside a block of thinking. None: it has no such block.
    thinking: bool | None = None
    #: Thinking was switched off.
    is_unthinking: bool = False
    #: The places of images; their entries in `tokens` are no tokens.
    images: tuple[ImageSpan, ...] = ()


def _merge_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
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
        facts = FileFacts(
            model.architecture,
            self.source or "",
            " ".join(filter(None, (model.meta("general.name"), model.meta("general.basename")))),
            {name: value for name, key in SAMPLING_KEYS.items() if (value := model.meta(key)) is not None},
        )
        #: The model's profile: its family, tool calls, thinking and recommended sampling.
        self.profile = resolve(profile, facts)
        self.tools: ToolCallStyle | None = self.profile.tools
        self._family = self.profile.family or Family("", "")
        thinking = self.profile.thinking
        shown = () if thinking is None else (thinking.opening, thinking.closing)
        model.know(shown=shown, allowed=MARKERS if self._family.has_channels else (), ends=self.profile.ends)
        spelled = {model.piece(token, special=True).decode("utf-8", "replace") for token in model.control_tokens}
        # llama.cpp makes ordinary tokens of some of these, which it finds in any text.
        spelled |= set(MARKERS) if self._family.has_channels else set()
        longest_first = sorted((text for text in spelled if len(text) > 1), key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
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
        variables = [value for value in request.template_arguments.values() if isinstance(value, str)]
        texts = [*(message.content for message in request.messages), request.prefill, *variables]
        mark, place = _unused_marks(*texts, tools_text, calls_text)
        messages, tools = request.messages, () if request.tool_choice == "none" else request.tools
        default = self._profile.default_system
        if default is not None and not any(message.role == "system" for message in messages):
            messages = (ChatMessage("system", default), *messages)
        if self._describes_tools and self.tools is not None:
            keeps = self._family.calls_as_texts
            messages, tools = calls.describe_tools(messages, tools, self.tools, keeps_turns=keeps), ()
        rendered = self._rendered_turns(messages, mark, place)
        if self._family.tools_in_system and tools:
            rendered = _in_system(rendered, [self._marked_in(calls.template_tool(tool), mark) for tool in tools])
        if self._profile.system == "user":
            rendered = _merge_system(rendered)
        if self._wants_parts:
            rendered = [{**one, "content": one["content"] and _parts(one["content"])} for one in rendered]
        arguments_given = self._arguments(request, mark)
        try:
            text = self._template.render(
                messages=rendered,
                tools=[self._marked_in(calls.template_tool(tool), mark) for tool in tools] or None,
                add_generation_prompt=True,
                bos_token=self._bos,
                eos_token=self._eos,
                **arguments_given,
            )
        except _TEMPLATE_ERRORS as error:
            raise StepFailure(
                FailureReason.TEMPLATE_ERROR, f"the chat template rejects these messages: {error}"
            ) from error
        text, thinking, is_unthinking = self._opened(text, request, arguments_given)
        text += self._marked(request.prefill, mark)
        spans: tuple[ImageSpan, ...] = ()
        if request.images:
            tokens, spans = self._with_images(request, text, mark, place, prepare)
        else:
            tokens = self._tokens(text, mark)
        return Prompt(tuple(tokens), self._profile.stop, thinking, is_unthinking, spans)

    def _with_images(
        self,
        request: GenerateRequest,
        text: str,
        mark: str,
        place: str,
        prepare: Callable[[Pixels], PreparedImage] | None,
    ) -> tuple[list[int], tuple[ImageSpan, ...]]:
        """Tokenise a rendered text, with the entries of images at their places."""
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
        return tokens, tuple(spans)

    def _arguments(self, request: GenerateRequest, mark: str) -> dict[str, Any]:
        """The variables of the template: those of the catalogue, of the requested effort, and of the request."""
        found: dict[str, Any] = dict(self._profile.arguments)
        effort, source = request.reasoning_effort, self.source or ""
        if effort is not None and _SWITCH in source:
            found[_SWITCH] = effort not in ("none", "minimal")
        elif effort is not None and _LEVEL in source:
            found[_LEVEL] = _LEVELS.get(effort, effort)
        return found | {name: self._marked_in(value, mark) for name, value in request.template_arguments.items()}

    def _opened(
        self, text: str, request: GenerateRequest, arguments: Mapping[str, Any]
    ) -> tuple[str, bool | None, bool]:
        """
        Return the rendered text, whether the answer begins inside the thinking (None: it does not think), and whether
        thinking was switched off.

        A prefill is the beginning of the answer, so thinking that the template opened is closed before it. A text with
        a grammar is opened here if the template leaves that to the model: the grammar then begins after its end.
        """
        tags, end = self.profile.thinking, text.rstrip()
        if self._family.has_channels:
            return self._in_channel(text, request)
        if tags is None:
            return text, None, False
        opened, closed = end.endswith(tags.opening), end.endswith(tags.closing)
        if request.prefill:
            return (f"{end}\n{tags.closing}\n\n" if opened else text), None, closed
        if opened or closed:
            return text, opened or None, closed
        switched_on = _SWITCH in (self.source or "") and arguments.get(_SWITCH) is not False
        if _begins_with_grammar(request):
            return (f"{text}{tags.opening}\n", True, False) if switched_on else (text, None, False)
        return text, False, False

    def _in_channel(self, text: str, request: GenerateRequest) -> tuple[str, bool | None, bool]:
        """As `_opened`, for answers in channels: False means that the answer begins with a header."""
        if text.rstrip().endswith("<|message|>"):  # a template that opens the answer itself
            return text, None, False
        if request.prefill:
            return f"{text}<|channel|>final<|message|>", None, False
        if _begins_with_grammar(request):
            return f"{text}<|channel|>analysis<|message|>", True, False
        return text, False, False

    def splitter(self, thinking: bool | None, encode: Callable[[str], str] = str) -> AnswerSplitter | None:
        """Return the splitter of one text. `thinking` is that of its prompt; the tags are encoded like the text."""
        if thinking is None:
            return None
        if self._family.has_channels:
            return ChannelSplitter("thinking" if thinking else "header")
        tags = self.profile.thinking
        assert tags is not None, "a prompt without tags has no thinking"
        return ThinkingSplitter(ThinkingTags(encode(tags.opening), encode(tags.closing)), thinking, not thinking)

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
            if index % 2 and self._family.has_channels:
                tokens += [token for one in part.replace(mark, "") for token in self._plain(one)]
            elif part or not index:
                first = add_special and not index
                tokens += self._model.tokenize(part.replace(mark, ""), add_special=first, parse_special=not index % 2)
        return tokens

    def _plain(self, character: str) -> list[int]:
        return self._model.tokenize(character, add_special=False, parse_special=False)

    def _marked(self, text: str, mark: str) -> str:
        """Return the text with a mark between the characters of each control token that it spells."""
        return self._controls.sub(lambda found: mark.join(found[0]), text)

    def _rendered_turns(self, messages: Sequence[ChatMessage], mark: str, place: str) -> list[dict[str, Any]]:
        """
        Return the messages in the form that chat templates expect, with control tokens marked.

        Calls have ids of nine characters, as Mistral's templates need them; results follow in the order of the calls.
        Images are numbers between two characters `place`.
        """
        count, waiting = itertools.count(1), deque[str]()
        found, number = [], 0
        for message in messages:
            ids = [f"call{next(count) % 100_000:05d}" for _ in message.tool_calls]
            found.append(self._rendered(message, mark, ids, self._content(message, mark, place, number)))
            number += len(message.images)
            if ids:
                waiting = deque(ids)
            elif message.role == "tool":
                found[-1]["tool_call_id"] = waiting.popleft() if waiting else f"call{next(count) % 100_000:05d}"
        return found

    def _content(self, message: ChatMessage, mark: str, place: str, number: int) -> str:
        """The text of a message, with control tokens marked; its images are counted from `number` on."""
        content, at = "", 0
        for index, image in enumerate(message.images):
            end = max(at, min(image.at, len(message.content)))
            content += self._marked(message.content[at:end], mark) + f"{place}{number + index}{place}"
            at = end
        return content + self._marked(message.content[at:], mark)

    def _rendered(self, message: ChatMessage, mark: str, ids: Sequence[str], content: str) -> dict[str, Any]:
        rendered: dict[str, Any] = {"role": message.role, "content": content}
        if not message.tool_calls:
            return rendered
        made = [
            ToolCall(self._marked(call.name, mark), self._marked_in(dict(call.arguments), mark))
            for call in message.tool_calls
        ]
        if self._family.calls_in_content and self.tools is not None:
            return {"role": message.role, "content": content + render(made, self.tools)}
        as_texts = self._family.calls_as_texts
        if as_texts and not content:
            rendered["content"] = None
        rendered["tool_calls"] = [
            {
                "id": id_,
                "type": "function",
                "function": {"name": call.name, "arguments": to_json(call.arguments) if as_texts else call.arguments},
            }
            for id_, call in zip(ids, made, strict=True)
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


def _in_system(messages: list[dict[str, Any]], tools: list[Any]) -> list[dict[str, Any]]:
    """Return the messages with the tools, as JSON, in the first system message."""
    first = next((message for message in messages if message["role"] == "system"), None)
    if first is None:
        messages = [first := {"role": "system", "content": ""}, *messages]
    first["tools"] = to_json([tool["function"] for tool in tools])
    return messages


def _begins_with_grammar(request: GenerateRequest) -> bool:
    """Whether a grammar constrains the answer from its beginning."""
    forced = bool(request.tools) and request.tool_choice not in ("auto", "none")
    return forced or request.schema is not None or request.grammar is not None


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **_: Any) -> str:
    """Serialise as JSON without HTML escapes, as chat templates expect."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return clock.now().strftime(pattern)

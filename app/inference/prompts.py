"""Prompts: converts a step of a workflow to a request to an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from app.grammar import gbnf_source
from app.inference.images import references
from app.inference.recommended import RECOMMENDABLE
from app.inference.requests import (
    ChatMessage,
    GenerateRequest,
    ImageInput,
    NamedTool,
    PriorityClass,
    Sampling,
    Tool,
    ToolCall,
)
from app.kernel.errors import FailureReason, InvalidInput, StepFailure
from app.workflows.expressions import conditions, templates
from app.workflows.language.generate_fields import GenerateFields, MessageTemplate, SamplingFields, StepToolChoice

#: More than any context: the limit is then what the context leaves.
MAX_TOKENS = 1_000_000
#: Most images of a message; the setting images.max_images is checked when they are read.
_MAX_IMAGES = 256


def request_of(step: GenerateFields, data: Mapping[str, Any], *, priority: str, attempt: int) -> GenerateRequest:
    """
    Returns the request of a step; `data` are the values for its templates.

    The first attempt uses the step's seed, and each further attempt increments it: with the same seed, the model would
    generate the same rejected text again.

    Raises StepFailure when a template or an expression cannot be evaluated.
    """
    sampling = sampling_of(step.sampling)
    if sampling.seed is not None:
        # The texts of one attempt have the seeds from this one on.
        sampling = replace(sampling, seed=(sampling.seed + (attempt - 1) * step.n) % 2**32)
    choice = step.tool_choice
    return GenerateRequest(
        messages=tuple(_message(part, data, place) for place, part in _messages(step)),
        prompt=templates.render(step.prompt, data) if step.prompt is not None and not step.chat else None,
        max_tokens=step.max_tokens or MAX_TOKENS,
        fits_context=step.max_tokens is None,
        truncates=step.truncation == "auto",
        sampling=sampling,
        stop=step.stop,
        schema=step.output.schema_ if step.output else None,
        grammar=None if step.grammar is None else _grammar(step.grammar),
        priority=PriorityClass(priority),
        n=step.n,
        logprobs=(step.top_logprobs or 0) if step.logprobs else None,
        tools=tuple(
            Tool(tool.function.name, tool.function.description, tool.function.parameters) for tool in step.tools
        ),
        tool_choice=NamedTool(choice.function.name)
        if isinstance(choice, StepToolChoice)
        else choice
        if step.tools
        else "auto",
        parallel_calls=step.parallel_tool_calls,
        template_arguments=step.template_arguments,
        reasoning_effort=step.reasoning_effort,
        prefill="" if step.prefill is None else templates.render(step.prefill, data),
    )


def sampling_of(fields: SamplingFields) -> Sampling:
    """Returns the sampling parameters of a step."""
    given = fields.model_dump(exclude_none=True, exclude={"logit_bias"})
    unset = RECOMMENDABLE - given.keys()
    bias = {int(token): float("-inf") if value <= -100 else value for token, value in fields.logit_bias.items()}
    return replace(Sampling(), **given, logit_bias=bias, unset=unset)


def _grammar(source: str) -> str:
    try:
        return gbnf_source.checked(source)
    except InvalidInput as error:  # the definition was checked by an earlier version
        raise StepFailure(FailureReason.INVALID_REQUEST, str(error)) from None


def messages_of(messages: Sequence[MessageTemplate], data: Mapping[str, Any]) -> list[ChatMessage]:
    """Returns messages with their templates rendered. Raises StepFailure."""
    return [_message(part, data, f"messages[{at}].images") for at, part in enumerate(messages)]


def _messages(step: GenerateFields) -> list[tuple[str, MessageTemplate]]:
    """The messages, each with the place of its images."""
    if step.prompt is None or not step.chat:
        return [(f"messages[{at}].images", part) for at, part in enumerate(step.messages)]
    system = [("", MessageTemplate(role="system", content=step.system))] if step.system else []
    return [*system, ("images", MessageTemplate(role="user", content=step.prompt, images=step.images))]


def _message(part: MessageTemplate, data: Mapping[str, Any], place: str) -> ChatMessage:
    content = "" if part.content is None else templates.render(part.content, data)
    found = [] if part.tool_calls is None else conditions.evaluate(part.tool_calls, data, result_type="list")
    named = [] if part.images is None else conditions.evaluate(part.images, data, result_type="list")
    if len(named) > _MAX_IMAGES:
        message = f"{place} has {len(named)} images; at most {_MAX_IMAGES} are accepted"
        raise StepFailure(FailureReason.INVALID_REQUEST, message)
    images = tuple(_image(value, f"{place}[{number}]") for number, value in enumerate(named))
    return ChatMessage(part.role, content, tuple(map(_call, found)), images)


def _image(value: Any, place: str) -> ImageInput:
    if not isinstance(value, str):
        message = f"{place} is no text; accepted: {references.ACCEPTED}"
        raise StepFailure(FailureReason.INVALID_REQUEST, message)
    return ImageInput(0, value, place)


def _call(value: Any) -> ToolCall:
    if isinstance(value, dict) and isinstance(value.get("name"), str) and isinstance(value.get("arguments"), dict):
        return ToolCall(value["name"], value["arguments"])
    message = "a value of 'tool_calls' is no tool call; each has a 'name' and an object 'arguments'"
    raise StepFailure(FailureReason.INVALID_REQUEST, message)

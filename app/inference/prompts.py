"""Prompts: converts a step of a workflow to a request to an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from app.inference.requests import ChatMessage, GenerateRequest, PriorityClass, Sampling
from app.workflows.expressions import templates
from app.workflows.language.steps import GenerateFields, MessageTemplate


def request_of(step: GenerateFields, data: Mapping[str, Any], *, priority: str, attempt: int) -> GenerateRequest:
    """
    Returns the request of a step; `data` are the values for its templates.

    The first attempt uses the step's seed, and each further attempt increments it: with the same seed, the model would
    generate the same rejected text again.

    Raises StepFailure when a template cannot be rendered.
    """
    sampling = replace(Sampling(), **step.sampling.model_dump(exclude_none=True))
    if sampling.seed is not None:
        sampling = replace(sampling, seed=(sampling.seed + attempt - 1) % 2**32)
    return GenerateRequest(
        messages=tuple(ChatMessage(part.role, templates.render(part.content, data)) for part in _messages(step)),
        prompt=templates.render(step.prompt, data) if step.prompt is not None and not step.chat else None,
        max_tokens=step.max_tokens,
        sampling=sampling,
        stop=step.stop,
        schema=step.output.schema_ if step.output else None,
        priority=PriorityClass(priority),
    )


def _messages(step: GenerateFields) -> tuple[MessageTemplate, ...]:
    if step.prompt is None or not step.chat:
        return step.messages
    system = (MessageTemplate(role="system", content=step.system),) if step.system else ()
    return (*system, MessageTemplate(role="user", content=step.prompt))

"""The resource `prompt` of a step: what it gives its model, with its templates rendered as the worker renders them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from app.access.callers import KeyScope
from app.api import problems
from app.api.callers import requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.api.workflows.run_ids import ResolvedRunId
from app.inference import prompts
from app.inference.requests import ChatMessage
from app.kernel.errors import InvalidInput, NotFound, Problem, StepFailure
from app.workflows.language.generate_fields import GenerateFields
from app.workflows.runs import views

router = ApiRouter(prefix="/v1/runs/{run_id}/steps/{key}/prompt", tags=["runs"], dependencies=[requires(KeyScope.READ)])


class PromptMessage(BaseModel):
    """A message, before the model's chat template."""

    role: str
    content: str
    tool_calls: list[dict[str, Any]] = []


class PromptOut(BaseModel):
    """What a step gives its model: messages, or one text."""

    messages: list[PromptMessage]
    prompt: str | None = Field(description="of a step with `chat: false`: the text that the model continues")


@router.get("", summary="The prompt of a step", responses=problems.documented(404, 422))
def get(run_id: ResolvedRunId, key: str, services: InjectedServices) -> PromptOut:
    """
    The messages of a `generate` step with its templates rendered over the run's values, as they are now.

    What a conversation adds (history, memories, blocks) is told by the step's report: see conversations.
    """
    if len(key) > 80:
        raise InvalidInput([Problem("key", "it is longer than any step's key", "the key of a step")], "request")
    step, data = views.work_of(services.database, run_id, key, services.settings.api.max_inline_bytes)
    if not isinstance(step, GenerateFields):
        raise NotFound("prompt of a step", key)
    try:
        request = prompts.request_of(step, data, priority="standard", attempt=1)
    except StepFailure as failure:
        raise InvalidInput([Problem("key", str(failure), "a step whose values can be rendered")], "request") from None
    return PromptOut(messages=[_message(one) for one in request.messages], prompt=request.prompt)


def _message(given: ChatMessage) -> PromptMessage:
    calls = [{"name": one.name, "arguments": dict(one.arguments)} for one in given.tool_calls]
    return PromptMessage(role=given.role, content=given.content, tool_calls=calls)

"""The resource `prompt-hooks`: the hooks on requests to models that the settings define."""

from __future__ import annotations

from importlib import metadata
from typing import Literal

from pydantic import BaseModel, Field

from app.access.callers import KeyScope
from app.api import problems
from app.api.callers import requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.kernel.sections.hooks import HookDefinition
from app.kernel.units import durations

router = ApiRouter(
    prefix="/v1/prompt-hooks", tags=["models"], dependencies=[requires(KeyScope.READ, all_namespaces=True)]
)


class PromptHookOut(BaseModel):
    """A hook."""

    name: str
    kind: str = Field(description="`pii`, `secrets`, `words`, `language`, `injection`, `python` or `http`")
    at: Literal["pre_prompt", "post_result", "both"]
    order: int = Field(description="smaller ones see the prompt earlier, and the result later")
    models: list[str]
    workflows: list[str]
    namespaces: list[str]
    timeout: str
    on_failure: Literal["open", "closed"]
    changes: bool = Field(description="whether it may change results")
    calls: str | None = Field(description="its entry point, or its address; null for shipped ones")
    installed: bool | None = Field(description="whether the host of the API has its entry point; null for other kinds")


class PromptHookList(BaseModel):
    """All hooks, in the order of `pre_prompt`."""

    hooks: list[PromptHookOut]


@router.get("", summary="List hooks", responses=problems.documented())
def page(services: InjectedServices) -> PromptHookList:
    """The hooks on requests to models, without their options. `arriero_hook_calls_total` counts what they do."""
    hooks = sorted(services.settings.hooks, key=lambda hook: hook.order)
    known = {point.name for point in metadata.entry_points(group="arriero.hooks")} if hooks else set()
    return PromptHookList(hooks=[_shown(hook, known) for hook in hooks])


def _shown(hook: HookDefinition, known: set[str]) -> PromptHookOut:
    return PromptHookOut(
        name=hook.name,
        kind=hook.kind,
        at=hook.at,
        order=hook.order,
        models=list(hook.models),
        workflows=list(hook.workflows),
        namespaces=list(hook.namespaces),
        timeout=durations.show(hook.timeout),
        on_failure=hook.on_failure,
        changes=hook.changes,
        calls=hook.entry_point or hook.url,
        installed=hook.entry_point in known if hook.kind == "python" else None,
    )

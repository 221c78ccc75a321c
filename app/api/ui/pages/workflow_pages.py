"""The pages of workflows: versions and what changed, the editor, trying one out, and schedules with their fires."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any
from uuid import UUID

from fastapi import Path, Query, Request
from fastapi.responses import HTMLResponse
from starlette.concurrency import run_in_threadpool

from app.access.callers import KeyScope
from app.api.callers import InjectedCaller, ListedNamespace, NamedNamespace, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.api.ui.pages.written import compared, written
from app.api.ui.rendering import render
from app.api.workflows import schedules as schedules_resource
from app.api.workflows import workflows as workflows_resource
from app.api.workflows.runs import deployment_of
from app.kernel.errors import InvalidDefinition, Problem
from app.workflows.language import check
from app.workflows.schedules.service import Schedules

router = ApiRouter(prefix="/ui", include_in_schema=False, dependencies=[requires(KeyScope.READ)])

_Name = Annotated[str, Path(max_length=100)]
_Version = Annotated[int | None, Query(ge=0, lt=2**31)]
#: What a new workflow begins with.
_STARTER = """workflow: my-workflow
description: What it is for

inputs:
  message: {type: string, default: Hello}

defaults:
  model: %s

steps:
  - id: answer
    kind: generate
    prompt: |
      Answer in one sentence.

      {{ inputs.message }}
    max_tokens: 80

outputs:
  answer: steps.answer.output
"""


@router.get("/workflows")
def listed(
    request: Request, caller: InjectedCaller, services: InjectedServices, namespace: ListedNamespace
) -> HTMLResponse:
    """All workflows."""
    found = workflows_resource.page(services, namespace).workflows
    return render(request, caller, "workflows.html", title="Workflows", workflows=found)


@router.get("/workflows/new")
def new(request: Request, caller: InjectedCaller, services: InjectedServices) -> HTMLResponse:
    """The editor with a first workflow in it."""
    model = next((one.name for one in services.catalog.models if "chat" in one.use_cases), "smollm2:135m")
    return render(
        request,
        caller,
        "workflow_editor.html",
        title="New workflow",
        name=None,
        version=None,
        namespace=None,
        text=_STARTER % model,
    )


@router.post("/workflows/check")
async def checked(request: Request, caller: InjectedCaller, services: InjectedServices) -> HTMLResponse:
    """What is wrong with a definition, as a part of a page. Nothing is stored."""
    text = (await request.body()).decode("utf-8", "replace")

    def found() -> HTMLResponse:
        definition = None
        problems: Sequence[Problem] = ()
        try:
            definition = check.parse(text, deployment_of(services))
        except InvalidDefinition as error:
            problems = error.problems
        return render(
            request,
            caller,
            "workflow_found.html",
            title="",
            definition=definition,
            problems=problems,
            models=() if definition is None else list(definition.models()),
        )

    return await run_in_threadpool(found)


@router.get("/workflows/{name}")
def one(
    request: Request,
    caller: InjectedCaller,
    services: InjectedServices,
    name: _Name,
    namespace: NamedNamespace,
    version: _Version = None,
) -> HTMLResponse:
    """A version of a workflow: its definition, its versions, and a form to try it."""
    found = workflows_resource.get(name, services, namespace, version)
    newest = found.versions[0].version if found.versions else found.version
    return render(
        request,
        caller,
        "workflow.html",
        title=name,
        workflow=found,
        namespace=namespace,
        is_newest=found.version >= newest,
        text=written(found.definition),
        fields=[field_of(key, schema) for key, schema in found.inputs.items()],
    )


@router.get("/workflows/{name}/diff")
def diff(
    request: Request,
    caller: InjectedCaller,
    services: InjectedServices,
    name: _Name,
    namespace: NamedNamespace,
    old: _Version = None,
    new: _Version = None,
) -> HTMLResponse:
    """What changed between two versions: by field, and line by line."""
    found = workflows_resource.diff(name, services, namespace, old, new)
    before = workflows_resource.get(name, services, namespace, found.old)
    after = workflows_resource.get(name, services, namespace, found.new)
    return render(
        request,
        caller,
        "workflow_diff.html",
        title=f"{name}: {found.old} → {found.new}",
        diff=found,
        namespace=namespace,
        lines=compared(written(before.definition), written(after.definition)),
        versions=after.versions,
    )


@router.get("/workflows/{name}/edit")
def edit(
    request: Request,
    caller: InjectedCaller,
    services: InjectedServices,
    name: _Name,
    namespace: NamedNamespace,
    version: _Version = None,
) -> HTMLResponse:
    """The editor with a version of a workflow."""
    found = workflows_resource.get(name, services, namespace, version)
    return render(
        request,
        caller,
        "workflow_editor.html",
        title=f"Edit {name}",
        name=name,
        version=found.version,
        namespace=namespace,
        text=written(found.definition),
    )


@router.get("/schedules")
def schedules(
    request: Request, caller: InjectedCaller, services: InjectedServices, listed: ListedNamespace
) -> HTMLResponse:
    """All schedules, with their next and last fires."""
    service = Schedules(services.runs, services.settings.schedules.keep_fires, listed or "default")
    found = schedules_resource.page(service, listed).schedules
    return render(request, caller, "schedules.html", title="Schedules", schedules=found, namespace=listed)


@router.get("/schedules/{name}")
def schedule(
    request: Request,
    caller: InjectedCaller,
    services: InjectedServices,
    name: _Name,
    namespace: NamedNamespace,
    cursor: UUID | None = None,
) -> HTMLResponse:
    """A schedule: the fires that were, and those that come."""
    service = Schedules(services.runs, services.settings.schedules.keep_fires, namespace)
    found = schedules_resource.get(name, service)
    return render(
        request,
        caller,
        "schedule.html",
        title=name,
        schedule=found,
        text=written(found.schedule),
        fires=schedules_resource.fires(name, service, limit=50, cursor=cursor),
        preview=schedules_resource.preview(name, service, 5),
    )


@dataclass(frozen=True, slots=True)
class InputField:
    """A field of the form for one input."""

    name: str
    #: text, area, number, integer, boolean, choice, or json for everything else.
    kind: str
    value: str
    choices: Sequence[str]
    required: bool
    description: str


def field_of(name: str, schema: Mapping[str, Any]) -> InputField:
    """Return the field for an input of this schema."""
    default = schema.get("default")
    kind = {"number": "number", "integer": "integer", "boolean": "boolean"}.get(str(schema.get("type")), "json")
    if schema.get("type") == "string":
        kind = "area" if schema.get("maxLength", 1000) > 200 else "text"
    choices = [str(one) for one in schema.get("enum", ())] if schema.get("type") == "string" else []
    if default is None:
        value = ""
    else:
        value = (
            default
            if isinstance(default, str) and kind in ("text", "area")
            else json.dumps(default, ensure_ascii=False, indent=1)
        )
    return InputField(
        name,
        "choice" if choices else kind,
        str(value),
        choices,
        "default" not in schema,
        str(schema.get("description", "")),
    )

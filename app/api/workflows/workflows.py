"""The resource `workflows`: list, show, compare and store."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import Path, Query, Response
from pydantic import BaseModel, Field

from app.access.callers import KeyScope
from app.api import bodies, problems
from app.api.bodies import RequestBody
from app.api.callers import ListedNamespace, NamedNamespace, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.api.workflows.runs import deployment_of
from app.workflows import registry
from app.workflows.language import check
from app.workflows.language import diff as differences
from app.workflows.registry import SHIPPED, Version

router = ApiRouter(prefix="/v1/workflows", tags=["workflows"], dependencies=[requires(KeyScope.READ)])

_Name = Annotated[str, Path(description="the name of the workflow", examples=["support-triage"])]


class WorkflowSummary(BaseModel):
    """A workflow in a list."""

    name: str
    namespace: str | None = Field(description="to whom it belongs; null for one that is shipped with Arriero")
    version: int = Field(description=f"{SHIPPED} for one that is shipped with Arriero and was not stored")
    description: str
    created_at: datetime | None = Field(description="null for one that is shipped with Arriero")
    inputs: dict[str, Any]
    steps: int
    models: list[str]
    tool: bool = Field(description="clients of the MCP server see it as a tool of its own")


class VersionOut(BaseModel):
    """A stored version."""

    version: int
    created_at: datetime


class WorkflowOut(WorkflowSummary):
    """A workflow with its definition and its versions."""

    definition: dict[str, Any]
    versions: list[VersionOut]


class WorkflowList(BaseModel):
    """The newest version of each workflow."""

    workflows: list[WorkflowSummary]


class ChangeOut(BaseModel):
    """One difference between two versions."""

    kind: Literal["added", "removed", "changed", "reordered"]
    path: str = Field(examples=["steps.draft.retry.max_attempts"])
    old: Any = Field(description="null when it was added; for `reordered` the keys or ids in their old order")
    new: Any = Field(description="null when it was removed")


class DiffOut(BaseModel):
    """The differences between two versions of a workflow."""

    name: str
    old: int
    new: int
    changes: list[ChangeOut]


@router.get("", summary="List workflows", responses=problems.documented())
def page(services: InjectedServices, namespace: ListedNamespace) -> WorkflowList:
    """The newest version of every workflow, by name."""
    found = registry.newest_of_all(services.database, namespace)
    return WorkflowList(workflows=[WorkflowSummary(**_summary(entry)) for entry in found])


@router.get("/{name}", summary="One workflow", responses=problems.documented(404, 422))
def get(
    name: _Name,
    services: InjectedServices,
    namespace: NamedNamespace,
    version: Annotated[int | None, Query(ge=0, description="by default the newest")] = None,
) -> WorkflowOut:
    """A version of a workflow with its definition."""
    return _out(registry.get(services.database, name, version, namespace=namespace), namespace, services)


@router.get("/{name}/diff", summary="What changed between two versions", responses=problems.documented(404, 422))
def diff(
    name: _Name,
    services: InjectedServices,
    namespace: NamedNamespace,
    old: Annotated[int | None, Query(ge=0, description="by default the version before `new`")] = None,
    new: Annotated[int | None, Query(ge=0, description="by default the newest")] = None,
) -> DiffOut:
    """Steps are matched by id, independent of their order."""
    later = registry.get(services.database, name, new, namespace=namespace)
    earlier = (
        registry.predecessor(services.database, later, namespace=namespace)
        if old is None
        else registry.get(services.database, name, old, namespace=namespace)
    )
    changes = differences.between(earlier.definition.document(), later.definition.document())
    found = [ChangeOut(kind=change.kind, path=change.path, old=change.old, new=change.new) for change in changes]
    return DiffOut(name=name, old=earlier.version, new=later.version, changes=found)


@router.put(
    "/{name}",
    dependencies=[requires(KeyScope.OPERATE)],
    summary="Store a workflow",
    responses=problems.documented(
        413, 415, 422, others={201: {"model": WorkflowOut, "description": "Stored as a new version"}}
    ),
    openapi_extra=bodies.documented(
        {"$ref": "#/components/schemas/Definition"},
        {"two steps": {"workflow": "greet", "steps": [{"id": "rest", "kind": "noop"}]}},
    ),
)
def put(
    name: _Name, body: RequestBody, services: InjectedServices, namespace: NamedNamespace, response: Response
) -> WorkflowOut:
    """
    Store a definition, in JSON or YAML, as the newest version of its name; 201.

    When the newest version is equal, it is returned with 200 and nothing is stored.
    Runs keep the version with which they were submitted.
    """
    definition = check.check(body, deployment_of(services))
    entry, created = registry.put(services.database, name, definition, namespace=namespace)
    response.status_code = 201 if created else 200
    return _out(entry, namespace, services)


def _out(entry: Version, namespace: str, services: InjectedServices) -> WorkflowOut:
    stored = registry.versions(services.database, entry.name, namespace=namespace)
    return WorkflowOut(
        **_summary(entry),
        definition=entry.definition.document(),
        versions=[VersionOut(version=number, created_at=at) for number, at in stored],
    )


def _summary(entry: Version) -> dict[str, Any]:
    definition = entry.definition
    return {
        "name": entry.name,
        "namespace": entry.namespace,
        "version": entry.version,
        "description": definition.description,
        "created_at": entry.created_at,
        "inputs": {name: dict(schema) for name, schema in definition.inputs.items()},
        "steps": len(definition.steps),
        "models": list(definition.models()),
        "tool": definition.tool,
    }

"""The resource `block-templates`: sets of blocks that are created together."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field

from app.access.callers import KeyScope
from app.api import bodies, problems
from app.api.callers import InjectedCaller, NamedNamespace, requires
from app.api.memory.blocks import TargetIO
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.inference.openai.generation import PlainText
from app.memory.blocks.block import DEFAULT_LIMIT, MAX_LABEL, BlockAuthor, BlockAuthorKind, NewBlock
from app.memory.blocks.templates import MAX_BLOCKS, BlockTemplate, BlockTemplates, ExistingLabels

router = ApiRouter(prefix="/v1/block-templates", tags=["memory"], dependencies=[requires(KeyScope.READ)])

_Name = Annotated[str, Path(description="the name of a template", max_length=MAX_LABEL)]


class TemplateBlock(BaseModel):
    """A block of a template."""

    model_config = ConfigDict(extra="forbid")

    label: PlainText = Field(max_length=MAX_LABEL)
    value: PlainText = ""
    description: PlainText = ""
    limit: int = DEFAULT_LIMIT
    read_only: bool = False


class TemplateIn(BaseModel):
    """A set of blocks."""

    model_config = ConfigDict(extra="forbid")

    blocks: list[TemplateBlock] = Field(min_length=1, max_length=MAX_BLOCKS)


class TemplateOut(BaseModel):
    """A template."""

    name: str
    blocks: list[TemplateBlock]
    updated_at: datetime | None = Field(description="null for one that is shipped")


class TemplateList(BaseModel):
    """The templates of a namespace, by name."""

    templates: list[TemplateOut]


class ApplyIn(BaseModel):
    """What the blocks of a template are attached to."""

    model_config = ConfigDict(extra="forbid")

    attach: list[TargetIO] = Field(min_length=1, max_length=20)
    existing: ExistingLabels = Field(
        default=ExistingLabels.REFUSE, description="when a label is attached there: refuse all, or keep that block"
    )


class AppliedOut(BaseModel):
    """The blocks that were created."""

    ids: list[str]
    labels: list[str]


@router.get("", summary="List templates", responses=problems.documented())
def page(services: InjectedServices, namespace: NamedNamespace) -> TemplateList:
    """The templates of a namespace and the shipped ones, by name."""
    return TemplateList(templates=[_out(one) for one in _templates(services).all(namespace)])


@router.get("/{name}", summary="One template", responses=problems.documented(404))
def get(name: _Name, services: InjectedServices, namespace: NamedNamespace) -> TemplateOut:
    """A template."""
    return _out(_templates(services).get(namespace, name))


@router.put(
    "/{name}",
    dependencies=[requires(KeyScope.OPERATE)],
    summary="Store a template",
    responses=problems.documented(409, 413, 415, 422),
    openapi_extra=bodies.documented_as(TemplateIn),
)
def put(
    name: _Name,
    services: InjectedServices,
    namespace: NamedNamespace,
    body: Annotated[TemplateIn, bodies.of(TemplateIn)],
) -> TemplateOut:
    """Store a template, in the place of one with the same name. Blocks that were created stay as they are."""
    blocks = [NewBlock(**one.model_dump()) for one in body.blocks]
    return _out(_templates(services).put(namespace, name, blocks))


@router.delete(
    "/{name}",
    status_code=204,
    dependencies=[requires(KeyScope.OPERATE)],
    summary="Remove a template",
    responses=problems.documented(404),
)
def delete(name: _Name, services: InjectedServices, namespace: NamedNamespace) -> None:
    """Remove a stored template. Blocks that were created stay."""
    _templates(services).delete(namespace, name)


@router.post(
    "/{name}/apply",
    status_code=201,
    dependencies=[requires(KeyScope.SUBMIT)],
    summary="Create the blocks of a template",
    responses=problems.documented(404, 409, 413, 415, 422),
    openapi_extra=bodies.documented_as(ApplyIn),
)
def apply(
    name: _Name,
    services: InjectedServices,
    caller: InjectedCaller,
    namespace: NamedNamespace,
    body: Annotated[ApplyIn, bodies.of(ApplyIn)],
) -> AppliedOut:
    """Create all blocks of a template and attach them, or none of them."""
    author = BlockAuthor(BlockAuthorKind.CALLER, caller.name)
    targets = [one.target() for one in body.attach]
    made = _templates(services).apply(namespace, name, author, targets, body.existing)
    return AppliedOut(ids=[one.id for one in made], labels=[one.label for one in made])


def _templates(services: Services) -> BlockTemplates:
    return BlockTemplates(services.database, services.settings.blocks)


def _out(one: BlockTemplate) -> TemplateOut:
    blocks = [TemplateBlock.model_validate(block, from_attributes=True) for block in one.blocks]
    return TemplateOut(name=one.name, blocks=blocks, updated_at=one.updated_at)

"""The resource `blocks`: memory blocks with their versions and attachments."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any

from fastapi import Header, Path, Query, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from app.access.callers import Caller, KeyScope
from app.api import bodies, problems
from app.api.callers import InjectedCaller, ListedNamespace, NamedNamespace, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.inference.openai.generation import PlainText
from app.kernel.errors import InvalidInput, Problem
from app.memory.blocks import diff as diffs
from app.memory.blocks.block import (
    DEFAULT_LIMIT,
    MAX_LABEL,
    MAX_TARGET,
    BlockAuthor,
    BlockAuthorKind,
    BlockChange,
    BlockChanged,
    BlockScope,
    BlockTarget,
    BlockTargetKind,
    BlockVersion,
    NewBlock,
)
from app.memory.blocks.rendering import render
from app.memory.blocks.service import Blocks, BlockView
from app.memory.blocks.storage import BlockFilter

router = ApiRouter(prefix="/v1/blocks", tags=["memory"], dependencies=[requires(KeyScope.READ)])

_WRITES = [requires(KeyScope.SUBMIT)]
_Id = Annotated[str, Path(description="the id of a block", max_length=64)]
_Name = Annotated[str | None, Query(max_length=MAX_TARGET)]
_Version = Annotated[int, Field(ge=1, lt=2**31)]
_IfMatch = Annotated[str | None, Header(max_length=64, description='the version that was read, such as `"3"`')]
_ETAG = re.compile(r'(?:W/)?"?([1-9][0-9]{0,9})"?', re.ASCII)


class TargetIO(BaseModel):
    """What a block is attached to."""

    model_config = ConfigDict(extra="forbid")

    kind: BlockTargetKind
    name: Annotated[PlainText, Field(max_length=MAX_TARGET)] = Field(
        default="", description="the id of a conversation, the name of a user or an agent; nothing for the namespace"
    )

    def target(self) -> BlockTarget:
        """Return it as a value."""
        return BlockTarget(self.kind, self.name)


class BlockIn(BaseModel):
    """A new block."""

    model_config = ConfigDict(extra="forbid")

    label: PlainText = Field(max_length=MAX_LABEL, description="never changes", examples=["human"])
    value: PlainText = ""
    description: PlainText = Field(default="", description="what it is for; models read it")
    limit: int = Field(default=DEFAULT_LIMIT, description="most characters of the value")
    read_only: bool = Field(default=False, description="models cannot edit it")
    attach: list[TargetIO] = Field(default=[], max_length=20)

    def new(self) -> NewBlock:
        """Return it as a value. Raises InvalidInput."""
        return NewBlock(self.label, self.value, self.description, self.limit, self.read_only)


class BlockPatch(BaseModel):
    """Changes of a block; what is left out stays."""

    model_config = ConfigDict(extra="forbid")

    version: _Version | None = Field(default=None, description="the version that was read, unless `If-Match` has it")
    value: PlainText | None = None
    description: PlainText | None = None
    limit: int | None = None
    read_only: bool | None = None


class BlockRollback(BaseModel):
    """A rollback."""

    model_config = ConfigDict(extra="forbid")

    to: _Version = Field(description="the version whose value, description and limit come back")
    version: _Version | None = Field(default=None, description="the version that was read, unless `If-Match` has it")


class BlockOut(BaseModel):
    """A block."""

    id: str = Field(examples=["block_0199a3c2d6f47a0b8c1d2e3f4a5b6c7d"])
    namespace: str
    label: str
    value: str
    description: str
    characters: int = Field(description="of the value")
    limit: int = Field(description="most characters of the value")
    read_only: bool
    version: int
    archived_at: datetime | None = Field(description="null while it is in context")
    attached: list[TargetIO]
    created_at: datetime
    updated_at: datetime


class BlockList(BaseModel):
    """A page of blocks, the newest first."""

    blocks: list[BlockOut]
    next_cursor: str | None = Field(description="the value of `cursor` for the next page; null on the last page")


class BlockContextOut(BaseModel):
    """The blocks that a prompt contains, and how."""

    blocks: list[BlockOut]
    text: str = Field(description="as it stands in a prompt")


class BlockAuthorOut(BaseModel):
    """Who wrote a version."""

    kind: BlockAuthorKind
    name: str = Field(description="the name of an API key, or a model")
    run_id: str | None
    step: str | None


class BlockVersionOut(BaseModel):
    """A version of a block."""

    version: int
    value: str
    description: str
    limit: int
    author: BlockAuthorOut
    operation: str = Field(examples=["create", "edit", "rollback to 2", "memory_replace"])
    created_at: datetime


class BlockVersionList(BaseModel):
    """Versions of a block, the newest first."""

    versions: list[BlockVersionOut]
    next_before: int | None = Field(description="the value of `before` for the next page; null on the last page")


class BlockDiffOut(BaseModel):
    """What changed between two versions."""

    from_version: int
    to_version: int
    changed: list[str] = Field(description="the fields that differ", examples=[["value"]])
    diff: str = Field(description="the change of the value, as a unified diff")


@router.get("", summary="List blocks", responses=problems.documented(404, 422))
def page(
    services: InjectedServices,
    namespace: ListedNamespace,
    label: Annotated[str | None, Query(max_length=MAX_LABEL)] = None,
    archived: Annotated[bool | None, Query(description="only archived ones, or only those in context")] = None,
    conversation: _Name = None,
    user: _Name = None,
    agent: _Name = None,
    query: Annotated[str | None, Query(min_length=1, max_length=200, description="a part of its texts")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=64, description="`next_cursor` of the previous page")] = None,
) -> BlockList:
    """Blocks, the newest first; with `conversation`, `user` or `agent` those that are attached to it."""
    wanted = BlockFilter(namespace, label, archived, _only_target(conversation, user, agent), query)
    found = _blocks(services).page(wanted, after=cursor, limit=limit)
    return BlockList(blocks=[_out(view) for view in found.blocks], next_cursor=found.next_cursor)


@router.post(
    "",
    status_code=201,
    dependencies=_WRITES,
    summary="Create a block",
    responses=problems.documented(409, 413, 415, 422),
    openapi_extra=bodies.documented_as(BlockIn),
)
def create(
    services: InjectedServices,
    caller: InjectedCaller,
    namespace: NamedNamespace,
    response: Response,
    body: Annotated[BlockIn, bodies.of(BlockIn)],
) -> BlockOut:
    """Create a block and attach it. At one target a label has one block."""
    targets = [one.target() for one in body.attach]
    return _tagged(response, _blocks(services).create(namespace, body.new(), _author(caller), targets))


@router.get("/in-context", summary="The blocks of a prompt", responses=problems.documented(422))
def in_context(
    services: InjectedServices,
    namespace: NamedNamespace,
    conversation: _Name = None,
    user: _Name = None,
    agent: _Name = None,
) -> BlockContextOut:
    """
    The blocks that a prompt for this conversation, agent and user contains, and the text of them.

    Of blocks with one label that of the conversation counts, or else that of the agent, the user, the namespace.
    """
    found = _blocks(services).in_context(BlockScope(namespace, user, conversation, agent))
    shown = [_out(BlockView(one.block, (one.target,))) for one in found]
    return BlockContextOut(blocks=shown, text=render([one.block for one in found]))


@router.get("/{block_id}", summary="One block", responses=problems.documented(404))
def get(block_id: _Id, services: InjectedServices, namespace: ListedNamespace, response: Response) -> BlockOut:
    """A block. Its version is also the `ETag`."""
    return _tagged(response, _blocks(services).get(namespace, block_id))


@router.patch(
    "/{block_id}",
    dependencies=_WRITES,
    response_model=BlockOut,
    summary="Edit a block",
    responses=problems.documented(404, 409, 412, 413, 415, 422),
    openapi_extra=bodies.documented_as(BlockPatch),
)
def edit(
    block_id: _Id,
    services: InjectedServices,
    caller: InjectedCaller,
    namespace: ListedNamespace,
    response: Response,
    body: Annotated[BlockPatch, bodies.of(BlockPatch)],
    if_match: _IfMatch = None,
) -> BlockOut | JSONResponse:
    """
    Edit a block, which makes a new version. The version that was read is needed, in `version` or `If-Match`.

    When the block has another one by now, nothing is changed: 409, or 412 for `If-Match`, with the current version.
    """
    blocks = _blocks(services)
    expected = _expected(blocks, namespace, block_id, body.version, if_match)
    change = BlockChange(body.value, body.description, body.limit, body.read_only)
    try:
        return _tagged(response, blocks.edit(namespace, block_id, change, _author(caller), expected=expected))
    except BlockChanged as error:
        return _changed(error, if_match)


@router.delete(
    "/{block_id}", status_code=204, dependencies=_WRITES, summary="Delete a block", responses=problems.documented(404)
)
def delete(block_id: _Id, services: InjectedServices, namespace: ListedNamespace) -> None:
    """Delete a block with its versions and attachments."""
    _blocks(services).delete(namespace, block_id)


@router.get("/{block_id}/versions", summary="The versions of a block", responses=problems.documented(404, 422))
def versions(
    block_id: _Id,
    services: InjectedServices,
    namespace: ListedNamespace,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    before: Annotated[int | None, Query(ge=1, lt=2**31, description="`next_before` of the previous page")] = None,
) -> BlockVersionList:
    """The versions that are kept, the newest first, each with its author."""
    found = _blocks(services).versions(namespace, block_id, before=before, limit=limit + 1)
    shown = [_version_out(one) for one in found[:limit]]
    return BlockVersionList(versions=shown, next_before=shown[-1].version if len(found) > limit else None)


@router.get("/{block_id}/versions/{version}", summary="One version", responses=problems.documented(404, 422))
def version(
    block_id: _Id, version: Annotated[int, Path(ge=1, lt=2**31)], services: InjectedServices, namespace: ListedNamespace
) -> BlockVersionOut:
    """A version of a block."""
    return _version_out(_blocks(services).version(namespace, block_id, version))


@router.get("/{block_id}/diff", summary="What changed", responses=problems.documented(404, 422))
def diff(
    block_id: _Id,
    services: InjectedServices,
    namespace: ListedNamespace,
    old: Annotated[int | None, Query(alias="from", ge=1, lt=2**31, description="by default the one before")] = None,
    new: Annotated[int | None, Query(alias="to", ge=1, lt=2**31, description="by default the newest")] = None,
) -> BlockDiffOut:
    """What changed between two versions: the fields, and the value as a unified diff."""
    blocks = _blocks(services)
    to = new or blocks.get(namespace, block_id).block.version
    since = old or max(to - 1, 1)
    first, second = blocks.version(namespace, block_id, since), blocks.version(namespace, block_id, to)
    found = diffs.diff(first, second)
    return BlockDiffOut(from_version=since, to_version=to, changed=list(found.changed), diff=found.text)


@router.post(
    "/{block_id}/rollback",
    dependencies=_WRITES,
    response_model=BlockOut,
    summary="Go back to an earlier version",
    responses=problems.documented(404, 409, 412, 413, 415, 422),
    openapi_extra=bodies.documented_as(BlockRollback),
)
def rollback(
    block_id: _Id,
    services: InjectedServices,
    caller: InjectedCaller,
    namespace: ListedNamespace,
    response: Response,
    body: Annotated[BlockRollback, bodies.of(BlockRollback)],
    if_match: _IfMatch = None,
) -> BlockOut | JSONResponse:
    """Make a new version with the value, the description and the limit of an earlier one."""
    blocks = _blocks(services)
    expected = _expected(blocks, namespace, block_id, body.version, if_match)
    try:
        return _tagged(response, blocks.rollback(namespace, block_id, body.to, _author(caller), expected=expected))
    except BlockChanged as error:
        return _changed(error, if_match)


@router.post(
    "/{block_id}/attach",
    dependencies=_WRITES,
    summary="Attach a block",
    responses=problems.documented(404, 409, 413, 415, 422),
    openapi_extra=bodies.documented_as(TargetIO),
)
def attach(
    block_id: _Id,
    services: InjectedServices,
    namespace: ListedNamespace,
    body: Annotated[TargetIO, bodies.of(TargetIO)],
) -> BlockOut:
    """Attach a block: it is in the prompts of a conversation, a user, an agent or the whole namespace."""
    return _out(_blocks(services).attach(namespace, block_id, body.target()))


@router.post(
    "/{block_id}/detach",
    dependencies=_WRITES,
    summary="Detach a block",
    responses=problems.documented(404, 413, 415, 422),
    openapi_extra=bodies.documented_as(TargetIO),
)
def detach(
    block_id: _Id,
    services: InjectedServices,
    namespace: ListedNamespace,
    body: Annotated[TargetIO, bodies.of(TargetIO)],
) -> BlockOut:
    """Detach a block. It is kept, also when it is attached to nothing."""
    return _out(_blocks(services).detach(namespace, block_id, body.target()))


@router.post("/{block_id}/archive", dependencies=_WRITES, summary="Archive a block", responses=problems.documented(404))
def archive(block_id: _Id, services: InjectedServices, namespace: ListedNamespace) -> BlockOut:
    """Take a block out of prompts. Recall and `archival_search` find it."""
    return _out(_blocks(services).set_archived(namespace, block_id, archived=True))


@router.post(
    "/{block_id}/restore", dependencies=_WRITES, summary="Restore a block", responses=problems.documented(404, 409)
)
def restore(block_id: _Id, services: InjectedServices, namespace: ListedNamespace) -> BlockOut:
    """Take an archived block back into the prompts of what it is attached to."""
    return _out(_blocks(services).set_archived(namespace, block_id, archived=False))


def _blocks(services: Services) -> Blocks:
    return Blocks(services.database, services.settings.blocks)


def _author(caller: Caller) -> BlockAuthor:
    return BlockAuthor(BlockAuthorKind.CALLER, caller.name)


def _only_target(conversation: str | None, user: str | None, agent: str | None) -> BlockTarget | None:
    given = {
        BlockTargetKind.CONVERSATION: conversation,
        BlockTargetKind.USER: user,
        BlockTargetKind.AGENT: agent,
    }
    found = [BlockTarget(kind, name) for kind, name in given.items() if name is not None]
    if len(found) > 1:
        raise InvalidInput(
            [Problem(f"query.{found[1].kind}", "only one of conversation, user, agent is accepted")], "query"
        )
    return found[0] if found else None


def _expected(blocks: Blocks, namespace: str | None, block_id: str, version: int | None, if_match: str | None) -> int:
    """Return the version that a change is based on. Raises InvalidInput, NotFound."""
    current = blocks.get(namespace, block_id).block.version
    if if_match is not None:
        match = _ETAG.fullmatch(if_match.strip())
        if match is None or (version is not None and version != int(match[1])):
            raise InvalidInput([Problem("If-Match", f"{if_match!r} is not the version", f'"{current}"')], "request")
        return int(match[1])
    if version is None:
        message = "it is missing: a change says which version it is based on"
        raise InvalidInput([Problem("version", message, f"{current}, or the header If-Match")], "request")
    return version


def _changed(error: BlockChanged, if_match: str | None) -> JSONResponse:
    """Return the refusal of a change that is based on another version, with the current one."""
    problem = Problem("version", f"{error.expected} is not the current version", str(error.current))
    status, title = (409, "block changed") if if_match is None else (412, "precondition failed")
    answer = problems.response(status, "block-changed", title, str(error), (problem,))
    answer.headers["ETag"] = f'"{error.current}"'
    return answer


def _tagged(response: Response, view: BlockView) -> BlockOut:
    response.headers["ETag"] = f'"{view.block.version}"'
    return _out(view)


def _out(view: BlockView) -> BlockOut:
    block = view.block
    return BlockOut(
        id=block.id,
        namespace=block.namespace,
        label=block.label,
        value=block.value,
        description=block.description,
        characters=len(block.value),
        limit=block.limit,
        read_only=block.read_only,
        version=block.version,
        archived_at=block.archived_at,
        attached=[TargetIO(kind=one.kind, name=one.name) for one in view.targets],
        created_at=block.created_at,
        updated_at=block.updated_at,
    )


def _version_out(one: BlockVersion) -> BlockVersionOut:
    return BlockVersionOut.model_validate(_plain(one), from_attributes=True)


def _plain(one: BlockVersion) -> dict[str, Any]:
    author = {name: getattr(one.author, name) for name in ("kind", "name", "run_id", "step")}
    fields = ("version", "value", "description", "limit", "operation", "created_at")
    return {**{name: getattr(one, name) for name in fields}, "author": author}

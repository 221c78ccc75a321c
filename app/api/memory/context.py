"""The resource `context`: documents of users and of the whole namespace."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

from fastapi import Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from app.access.audit import log as audit_log
from app.access.callers import KeyScope
from app.api import auditing, bodies, problems
from app.api.callers import InjectedCaller, ListedNamespace, NamedNamespace, requires
from app.api.routers import ApiRouter
from app.api.services import InjectedServices, Services
from app.inference.openai.generation import PlainText
from app.kernel.errors import InvalidInput, Problem
from app.memory.personal import importing, storage
from app.memory.personal.document import (
    MAX_USER,
    ContextDocument,
    ContextFormat,
    ContextKind,
    ContextSource,
    parsed,
    user_problems,
)
from app.memory.personal.relevant import relevant, render
from app.memory.personal.service import PersonalContext
from app.memory.personal.storage import ContextOwner
from app.memory.recall.query import MAX_QUERY

router = ApiRouter(prefix="/v1/context", tags=["memory"], dependencies=[requires(KeyScope.READ)])

_WRITES = [requires(KeyScope.SUBMIT)]
_Name = Annotated[str, Path(description="the name of a document", max_length=200)]
_User = Annotated[str | None, Query(description="without it, documents of the whole namespace", max_length=MAX_USER)]


class ContextIn(BaseModel):
    """A document."""

    model_config = ConfigDict(extra="forbid")

    content: PlainText | dict[str, Any] | list[Any] = Field(
        description="Markdown, with front matter if it needs any; or JSON, as a value or as a text"
    )
    format: ContextFormat | None = Field(default=None, description="by default JSON for a value, Markdown for a text")
    version: int | None = Field(
        default=None, ge=0, lt=2**31, description="the version that it replaces, 0 for none; another one is refused"
    )


class ContextOut(BaseModel):
    """A document."""

    id: str = Field(examples=["doc_0199a3c2d6f47a0b8c1d2e3f4a5b6c7d"])
    namespace: str
    user: str | None = Field(description="null for a document of the whole namespace")
    kind: ContextKind
    name: str
    title: str
    tags: list[str]
    always: bool = Field(description="it is in each prompt")
    format: ContextFormat
    source: ContextSource
    version: int
    content: str | None = Field(description="as it was written; null in lists")
    created_at: datetime
    updated_at: datetime


class ContextList(BaseModel):
    """A page of documents in the order in which they were created, without their contents."""

    documents: list[ContextOut]
    next_cursor: str | None = Field(description="the value of `cursor` for the next page; null on the last page")


class ContextFileOut(BaseModel):
    """A file of the watched folder."""

    path: str
    user: str | None
    document: str | None = Field(description="the id of its document")
    problem: str = Field(description="why it is no document; empty when it is one")
    read_at: datetime


class ContextFileList(BaseModel):
    """Files of the watched folder, by path."""

    folder: bool = Field(description="whether a folder is watched (setting context.folder)")
    files: list[ContextFileOut]
    next_cursor: str | None


class RelevantIn(BaseModel):
    """What a prompt is about."""

    model_config = ConfigDict(extra="forbid")

    query: PlainText = Field(default="", max_length=MAX_QUERY)
    user: Annotated[PlainText, Field(min_length=1, max_length=MAX_USER)] | None = None
    limit: int = Field(default=8, ge=0, le=50, description="most parts that are found for the query")


class ContextPartOut(BaseModel):
    """A part of a document."""

    document_id: str
    kind: ContextKind
    name: str
    heading: str
    text: str
    section: int
    score: float | None = Field(description="null for a document that is in each prompt")


class RelevantOut(BaseModel):
    """The parts of documents that a prompt contains."""

    parts: list[ContextPartOut]
    text: str = Field(description="as it stands in a prompt")
    search: dict[str, Any] | None = Field(description="how the others were found; null without a query")


@router.get("", summary="List documents", responses=problems.documented(422))
def page(
    services: InjectedServices,
    namespace: ListedNamespace,
    user: Annotated[str | None, Query(min_length=1, max_length=MAX_USER)] = None,
    shared: Annotated[bool, Query(description="only those of the whole namespace")] = False,
    kind: ContextKind | None = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 100,
    cursor: Annotated[str | None, Query(max_length=64, description="`next_cursor` of the previous page")] = None,
) -> ContextList:
    """Documents in the order in which they were created, without their contents."""
    if user is not None and shared:
        raise InvalidInput([Problem("query.shared", "documents of a user belong to nobody else", "false")], "query")
    found = _context(services).page(namespace, user=user, of_namespace=shared, kind=kind, after=cursor, limit=limit)
    return ContextList(documents=[_out(one) for one in found.documents], next_cursor=found.next_cursor)


@router.get("/files", summary="Files of the watched folder", responses=problems.documented(422))
def files(
    services: InjectedServices,
    namespace: ListedNamespace,
    problem: Annotated[bool, Query(description="only files that are no documents")] = False,
    limit: Annotated[int, Query(ge=1, le=200)] = 100,
    cursor: Annotated[str | None, Query(max_length=4096, description="`next_cursor` of the previous page")] = None,
) -> ContextFileList:
    """The files of the watched folder as they were read last, and what is wrong with each."""
    with services.database.work() as work:
        rows = importing.files_in(work, namespace, only_problems=problem, after=cursor, limit=limit + 1)
    shown = [
        ContextFileOut(path=one.path, user=one.user, document=one.document_id, problem=one.problem, read_at=one.read_at)
        for one in rows[:limit]
    ]
    watched = services.settings.context.folder is not None
    return ContextFileList(folder=watched, files=shown, next_cursor=shown[-1].path if len(rows) > limit else None)


@router.post(
    "/relevant",
    summary="What a prompt contains",
    responses=problems.documented(413, 415, 422),
    openapi_extra=bodies.documented_as(RelevantIn),
)
def find_relevant(
    services: InjectedServices, namespace: NamedNamespace, body: Annotated[RelevantIn, bodies.of(RelevantIn)]
) -> RelevantOut:
    """The parts that a prompt of a user about something contains, with the ids of their documents and their scores."""
    owner = _owner(namespace, body.user)
    found = relevant(services.database, services.recall, owner, body.query, body.limit)
    search = None
    if found.recalled is not None:
        search = {"lexical": asdict(found.recalled.lexical), "dense": asdict(found.recalled.dense)}
    parts = [ContextPartOut.model_validate(asdict(part)) for part in found.parts]
    return RelevantOut(parts=parts, text=render(found.parts), search=search)


@router.get("/{kind}/{name}", summary="One document", responses=problems.documented(404, 422))
def get(
    kind: ContextKind, name: _Name, services: InjectedServices, namespace: NamedNamespace, user: _User = None
) -> ContextOut:
    """A document with its content."""
    return _out(_context(services).get(_owner(namespace, user), kind, name), whole=True)


@router.put(
    "/{kind}/{name}",
    dependencies=_WRITES,
    summary="Store a document",
    responses=problems.documented(409, 413, 415, 422, others={201: {"model": ContextOut, "description": "Created"}}),
    openapi_extra=bodies.documented_as(ContextIn),
)
def put(
    kind: ContextKind,
    name: _Name,
    request: Request,
    response: Response,
    services: InjectedServices,
    caller: InjectedCaller,
    namespace: NamedNamespace,
    body: Annotated[ContextIn, bodies.of(ContextIn)],
    user: _User = None,
) -> ContextOut:
    """Store a document, in the place of one with the same name; 201 for a new one. It is checked first."""
    is_text = isinstance(body.content, str)
    format_ = body.format or (ContextFormat.MARKDOWN if is_text else ContextFormat.JSON)
    if not is_text and format_ is not ContextFormat.JSON:
        raise InvalidInput([Problem("format", f"{format_} is a text, and the content is not", "json")], "request")
    content = body.content if isinstance(body.content, str) else json.dumps(body.content, ensure_ascii=False, indent=2)
    settings = services.settings.context
    new = parsed(kind, name, format_, content, settings.max_document_bytes)
    with services.database.work() as work:
        stored, created = storage.put_in(work, _owner(namespace, user), new, settings, expected=body.version)
        # Without the content: what a user asks to be deleted must not stay in the audit log.
        audit_log.add(work, auditing.record_of(request, caller, {"user": user, "characters": len(content)}))
    response.status_code = 201 if created else 200
    return _out(stored, whole=True)


@router.delete(
    "/{kind}/{name}",
    status_code=204,
    dependencies=_WRITES,
    summary="Delete a document",
    responses=problems.documented(404, 409, 422),
)
def delete(
    kind: ContextKind, name: _Name, services: InjectedServices, namespace: NamedNamespace, user: _User = None
) -> None:
    """Delete a document. One of the watched folder is deleted with its file."""
    _context(services).delete(_owner(namespace, user), kind, name)


def _context(services: Services) -> PersonalContext:
    return PersonalContext(services.database)


def _owner(namespace: str, user: str | None) -> ContextOwner:
    if user is not None and (found := user_problems(user, "query.user")):
        raise InvalidInput(found, "request")
    return ContextOwner(namespace, user)


def _out(document: ContextDocument, *, whole: bool = False) -> ContextOut:
    return ContextOut(
        id=document.id,
        namespace=document.namespace,
        user=document.user,
        kind=document.kind,
        name=document.name,
        title=document.title,
        tags=list(document.tags),
        always=document.always,
        format=document.format,
        source=document.source,
        version=document.version,
        content=document.content if whole else None,
        created_at=document.created_at,
        updated_at=document.updated_at,
    )

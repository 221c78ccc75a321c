"""
Auditing: every change over the API gets an entry in the audit log, calls of models and submissions of runs excepted.

Settings and limits are written in one transaction with their entry. All other changes get theirs before their answer is
sent; a database that does not take it within `PATIENCE` does not hold the answer back. What could not be written is
logged completely, kept, and written with a later entry: at most `MAX_KEPT` of them, and none after a crash.
See app/decisions.md, 72.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from typing import Any

import psycopg
from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.access.audit import log as audit_log
from app.access.audit.entry import storable, summary_of
from app.access.audit.log import AuditRecord
from app.access.callers import Caller
from app.api import threads
from app.api.services import Services
from app.kernel import log
from app.kernel.errors import DatabaseUnreachable

_log = log.get(__name__)

#: Seconds for which an answer waits for its entry.
PATIENCE = 2.0
#: Most entries that wait for the database.
MAX_KEPT = 1_000
#: Bytes of a body that are looked at for the summary.
_MAX_BODY = 16 * 1024
_READS = frozenset({"GET", "HEAD", "OPTIONS"})
#: Ordinary work, which has a history of its own: calls of models, compressions, runs, their events, files and batches;
#: what is said in conversations; edits of memory blocks, whose versions have their authors.
#: The texts of conversations, memories and documents must not outlive them here.
ORDINARY = frozenset(
    {
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/rerank"),
        ("POST", "/v1/compress"),
        ("POST", "/v1/recall"),
        ("POST", "/v1/responses"),
        ("POST", "/v1/runs"),
        ("POST", "/v1/runs/{run_id}/events"),
        ("POST", "/v1/runs/{run_id}/fork"),
        ("POST", "/v1/files"),
        # They change nothing.
        ("POST", "/v1/splits/size"),
        ("POST", "/v1/rules/test"),
        ("POST", "/v1/rules/{name}/test"),
        ("POST", "/v1/handoffs/{name}/test"),
        # Messages have a record of their own; their texts must not outlive it here.
        ("POST", "/v1/handoffs/{name}/messages"),
        ("POST", "/v1/hooks/{namespace}/{name}"),
        ("POST", "/v1/batches"),
        ("POST", "/v1/blocks"),
        ("PATCH", "/v1/blocks/{block_id}"),
        ("POST", "/v1/blocks/{block_id}/rollback"),
        # Its endpoint writes an entry without the document, which its user may ask to be deleted.
        ("PUT", "/v1/context/{kind}/{name}"),
        ("POST", "/v1/context/relevant"),
        ("POST", "/v1/conversations"),
        ("POST", "/v1/conversations/{conversation_id}/items"),
        ("POST", "/v1/conversations/{conversation_id}/messages"),
        ("POST", "/v1/conversations/{conversation_id}/fork"),
        ("POST", "/v1/consolidations"),
        ("POST", "/v1/memories"),
        ("POST", "/v1/memories/{memory_id}/invalidate"),
        ("POST", "/v1/memories/{memory_id}/supersede"),
        ("POST", "/v1/memories/{memory_id}/breakthrough"),
        ("POST", "/api/chat"),
        ("POST", "/api/generate"),
        ("POST", "/api/embed"),
        ("POST", "/api/embeddings"),
        ("POST", "/api/show"),
    }
)


class AuditMiddleware:
    """ASGI middleware that writes an entry of the audit log for each change."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app, self._log = app, AuditWriter(services)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and write what came of it before it is answered."""
        if scope["type"] != "http" or scope["method"] in _READS or (scope["method"], scope["path"]) in ORDINARY:
            await self._app(scope, receive, send)
            return
        body = bytearray()
        length, begun = 0, False

        async def noting_receive() -> Message:
            nonlocal length
            message = await receive()
            part = message.get("body", b"")
            length += len(part)
            body.extend(part[: _MAX_BODY - len(body)])
            return message

        async def noting_send(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start" and not begun:
                begun = True
                await self._note(scope, message["status"], bytes(body), length)
            await send(message)

        try:
            await self._app(scope, noting_receive, noting_send)
        except Exception:  # it is raised again; the answer with status 500 is made outside of this middleware
            if not begun:
                await self._note(scope, 500, bytes(body), length)
            raise

    async def _note(self, scope: Scope, status: int, body: bytes, length: int) -> None:
        route, state = scope.get("route"), scope.get("state", {})
        caller = state.get("caller")
        # Without a route nothing was changed, and without a caller nobody was known: such requests are not kept.
        if route is None or caller is None or state.get("audited") or status in (401, 404, 405):
            return
        path = str(getattr(route, "path", scope["path"]))
        if (scope["method"], path) in ORDINARY:
            return
        writing = asyncio.ensure_future(
            threads.run_for_request(self._log.write, scope, path, status, body, length, caller)
        )
        _, late = await asyncio.wait((writing,), timeout=PATIENCE)
        if late:
            _log.warning("audit_entry_is_late", action=f"{scope['method']} {path}", status=status)


class AuditWriter:
    """Writes entries, and keeps those that the database did not take. Safe for threads."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._kept: deque[AuditRecord] = deque(maxlen=MAX_KEPT)
        self._lock = threading.Lock()

    def write(self, scope: Scope, path: str, status: int, body: bytes, length: int, caller: Caller) -> None:
        """Write the entry of a request. Never raises: what could not be written is logged."""
        try:
            record = _record(scope, path, status, _summary(body, length), caller)
        except Exception:  # noqa: BLE001 the outermost frame of a thread: no request fails because of its entry
            _log.exception("audit_entry_not_made", path=path, status=status)
            return
        with self._lock:
            waiting = [*self._kept, record]
            self._kept.clear()
        try:
            audit_log.add_all(self._services.database, waiting)
        except DatabaseUnreachable as error:
            with self._lock:
                self._kept.extend(waiting)
            _log.error("audit_entry_not_written", error=str(error), kept=len(waiting), **_fields(record))
        except psycopg.Error as error:
            self._write_one_by_one(waiting, error)
        except Exception:  # noqa: BLE001 as above
            _log.exception("audit_entry_not_written", **_fields(record))

    def _write_one_by_one(self, records: list[AuditRecord], error: Exception) -> None:
        """One entry that the database refuses takes no other with it."""
        for record in records:
            try:
                audit_log.add_all(self._services.database, [record])
            except (DatabaseUnreachable, psycopg.Error):
                _log.error("audit_entry_not_written", error=str(error), **_fields(record))


def record_of(request: Request, caller: Caller, body: Any) -> AuditRecord:
    """
    Return the entry of a change that its endpoint writes itself, in the transaction of the change.

    The request gets no second one.
    """
    request.state.audited = True
    path = request.scope["route"].path
    return _record(request.scope, path, 200, summary_of(body), caller)


def _record(scope: Scope, path: str, status: int, summary: str, caller: Caller) -> AuditRecord:
    client = scope.get("client")
    return AuditRecord(
        actor=caller.name,
        action=f"{scope['method']} {path}",
        status=status,
        namespace=caller.namespace or "",
        key_id=caller.key_id,
        target={name: str(value) for name, value in scope.get("path_params", {}).items()},
        summary=summary,
        address=client[0] if client else "",
    )


def _summary(body: bytes, length: int) -> str:
    if not length:
        return ""
    if length > len(body):
        return f"({length} bytes)"
    try:
        return summary_of(json.loads(body))
    except (ValueError, RecursionError):
        return f"({length} bytes that are not JSON)"


def _fields(record: AuditRecord) -> dict[str, Any]:
    return {
        "actor": record.actor,
        "key_id": record.key_id,
        "namespace": record.namespace,
        "action": record.action,
        "target": dict(record.target),
        "status": record.status,
        "address": record.address,
        "summary": storable(record.summary, 200),
    }

"""
Flower's handlers behind API keys, with the queues and links of Arriero.

Each handler of Flower's becomes a class that checks the caller first. To revoke a task cancels its run, because a
message is only a hint; what would end in a stuck queue is refused with what to do instead.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any
from uuid import UUID

from flower.api.control import TaskRevoke
from flower.api.tasks import GetQueueLengths
from flower.utils import tasks
from flower.views import BaseHandler
from flower.views.broker import BrokerView
from flower.views.tasks import TaskView
from tornado.web import HTTPError, RequestHandler

from app.access.audit import log as audit_log
from app.access.audit.entry import storable
from app.access.audit.log import AuditRecord
from app.access.callers import Caller, NotAllowed, NotAuthenticated
from app.kernel import log
from app.kernel.broker import CONTROL_QUEUE, IO_QUEUE, model_queue
from app.kernel.errors import ArrieroError, NotFound, Unavailable

if TYPE_CHECKING:
    from workers.flower import GuardedFlower

_log = log.get(__name__)

_MEDIA_TYPE = "application/problem+json"


#: The classes that were made.
_MADE: dict[type[RequestHandler], type[RequestHandler]] = {}


def with_keys(handler: type[RequestHandler]) -> type[RequestHandler]:
    """Return the handler as a class that checks the caller first."""
    if handler not in _MADE:
        _MADE[handler] = _made(handler)
    return _MADE[handler]


def _made(handler: type[RequestHandler]) -> type[RequestHandler]:
    bases: list[type[Any]] = [_Checked]
    replaced = {BrokerView: _Queues, GetQueueLengths: _Queues, TaskView: _Linked, TaskRevoke: _Revoke}
    bases += [more for base, more in replaced.items() if issubclass(handler, base)]
    return type(handler.__name__, (*bases, handler), {})


class _Checked(RequestHandler):
    """Checks the caller, and writes changes to the audit log."""

    application: GuardedFlower
    #: None where anybody may send the request.
    caller: Caller | None = None
    #: Flower's own switch: the key was checked here.
    unauthenticated_api = True

    def set_default_headers(self) -> None:
        """No page of another origin may read an answer."""
        self.set_header("X-Content-Type-Options", "nosniff")

    async def prepare(self) -> None:
        access = self.application.access
        if not access.is_open(self.request):
            try:
                self.caller = await self.application.on_thread(access.caller_of, self.request)
            except (NotAuthenticated, NotAllowed, Unavailable) as error:
                self._refuse(error)
                return
        following = super().prepare()
        if following is not None:
            await following

    def on_finish(self) -> None:
        super().on_finish()
        if self.caller is not None and self.application.access.changes(self.request):
            self.application.in_background(self._audit, self.caller, self.get_status())

    def _audit(self, caller: Caller, status: int) -> None:
        request = self.request
        record = AuditRecord(
            caller.name,
            storable(f"Flower {request.method} {request.path}", 300),
            status,
            namespace=caller.namespace or "",
            key_id=caller.key_id,
            address=request.remote_ip or "",
        )
        audit_log.add_all(self.application.database, [record])

    def _refuse(self, error: ArrieroError) -> None:
        status = 401 if isinstance(error, NotAuthenticated) else 403 if isinstance(error, NotAllowed) else 503
        self.set_status(status)
        if status == 401:
            self.add_header("WWW-Authenticate", 'Basic realm="Arriero: the password is an API key", charset="UTF-8"')
            self.add_header("WWW-Authenticate", 'Bearer realm="arriero"')
        self.set_header("Content-Type", _MEDIA_TYPE)
        document = {"type": "about:blank", "title": type(error).__name__, "status": status, "detail": str(error)}
        self.finish(json.dumps(document))


class _Queues(BaseHandler):  # type: ignore[misc] # Flower has no type hints
    """Shows the queues without a worker too: there, work waits unseen."""

    def get_active_queue_names(self) -> list[str]:
        models = {model_queue(model.slug) for model in self.application.catalogs.current()}
        return sorted({CONTROL_QUEUE, IO_QUEUE} | models | _consumed(self.application.workers).keys())

    def get_broker(self) -> Any:
        return _ShownQueues(super().get_broker(), _consumed(self.application.workers))


class _ShownQueues:
    """Flower's broker: queues with messages or a worker, with the number of workers."""

    def __init__(self, broker: Any, consumed: Mapping[str, int]) -> None:
        self._broker, self._consumed = broker, consumed

    async def queues(self, names: Collection[str]) -> list[dict[str, Any]]:
        found = []
        for queue in await self._broker.queues(names):
            name, workers = queue["name"], self._consumed.get(queue["name"], 0)
            if queue["messages"] or workers or name in (CONTROL_QUEUE, IO_QUEUE):
                found.append({**queue, "messages_ready": queue["messages"], "consumers": workers})
        return found


def _consumed(workers: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Return how many workers consume each queue."""
    counts: dict[str, int] = {}
    for info in workers.values():
        for queue in info.get("active_queues", []):
            counts[queue["name"]] = counts.get(queue["name"], 0) + 1
    return counts


class _Linked(BaseHandler):  # type: ignore[misc] # as above
    """Links a task to its run, whose history is durable."""

    def render_string(self, template_name: str, **kwargs: Any) -> bytes:
        page: bytes = super().render_string(template_name, **kwargs)
        run = run_of(kwargs.get("task"))
        if run is None:
            return page
        link = f'<a href="{self.application.api_url(self.request.host_name)}/v1/runs/{run}">{run}</a>'
        return page.replace(str(run).encode(), link.encode(), 1)


class _Revoke(BaseHandler):  # type: ignore[misc] # as above
    """Revokes a task: cancels the run of its step."""

    async def post(self, taskid: str) -> None:
        if self.application.options.read_only:
            raise HTTPError(403, "Read only mode is enabled")
        run = run_of(tasks.get_task_by_id(self.application.events, taskid))
        if run is None:
            raise HTTPError(404, f"Flower has no task {taskid!r}; its run is cancelled with: arriero runs cancel RUN")
        try:
            state = await self.application.on_thread(self.application.cancel, run)
        except NotFound as error:
            raise HTTPError(404, str(error)) from None
        except Unavailable as error:
            raise HTTPError(503, str(error)) from None
        self.write({"message": f"Revoked '{taskid}': run {run} is {state}"})


def run_of(task: Any) -> UUID | None:
    """Return the run of a task that a worker has told of; None for another task."""
    try:
        about = ast.literal_eval(getattr(task, "kwargs", None) or "None")
        return UUID(about["run"]) if isinstance(about, dict) else None
    except (ValueError, SyntaxError, KeyError, TypeError, AttributeError, RecursionError, MemoryError):
        return None

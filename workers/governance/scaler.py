"""
The job of the scaler: decides how many hosts are wanted, drains and keeps hosts, and sends requests for hosts.

A request is a POST that is signed as by Standard Webhooks, or the standard input of a program. Its id is the same in
each attempt. It is accepted when the answer is 2xx, or the program ends with 0; the answer's content is not read.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from app.access.audit import log as audit_log
from app.access.audit.log import AuditRecord
from app.fleet.host import HostState
from app.governance.scaler import service
from app.governance.scaler.service import ScalerView
from app.inference import demand
from app.kernel import clock, log
from app.kernel.errors import NotFound, StepFailure
from app.kernel.security import webhook_signatures
from app.kernel.security.webhook_signatures import UnusableSecret
from app.scheduler import reconcile, wake_up
from app.scheduler.operator_commands import OperatorCommands
from app.workflows.http.calls import HttpBody, HttpCall
from workers import connections, outbound
from workers.connections import Resolve
from workers.runtime import Runtime

_log = log.get(__name__)

#: Most bytes of an answer that are read, and of a program's error output that is told.
_MAX_ANSWER, _MAX_ERROR = 64 * 1024, 500
#: The action in the audit log, and who acts.
_ACTION, _ACTOR = "scaler.ask", "scaler"


class ScalerRequestFailed(Exception):
    """A request was not accepted, with the reason."""


def run_scaler(runtime: Runtime) -> Mapping[str, object] | None:
    """Decide, and send what is not accepted yet. Raises Unavailable."""
    settings, database = runtime.settings.scaler, runtime.runs.database
    if settings.mode == "off" or not settings.classes:
        return None
    kept = (*runtime.settings.pools.models, *runtime.settings.serving.resident)
    needed = demand.observe(database, runtime.catalog, kept)
    seen = reconcile.observe_only(database, needed)
    if settings.mode == "dry_run":
        views = service.plan(database, settings, seen, needed)
        return {"would_ask": {one.scaled.name: one.decision.hosts for one in views if one.decision.is_asked}}
    decided = service.advance(database, settings, seen, needed)
    if decided is not None:
        _mark(runtime, decided)
    asked = [one.name for one in settings.classes if _send(runtime, one.name)]
    return {"asked": asked} if asked else None


def _mark(runtime: Runtime, views: Sequence[ScalerView]) -> None:
    """Drain hosts, and make hosts schedulable again. A host that is gone is passed over."""
    commands = OperatorCommands(runtime.runs.database, partial(wake_up.wake_reconciler, runtime.runs.publisher))
    for view in views:
        wanted = [(name, HostState.DRAINING) for name in view.decision.drain]
        wanted += [(name, HostState.SCHEDULABLE) for name in view.decision.keep]
        for name, state in wanted:
            try:
                commands.mark(name, state)
            except NotFound:
                _log.info("scaler_host_gone", host=name)


def _send(runtime: Runtime, name: str) -> bool:
    """Send the pending request of a class, unless another worker does; returns whether it was accepted."""
    settings, database = runtime.settings.scaler, runtime.runs.database
    request = service.claim(database, name, settings.timeout)
    if request is None:
        return False
    problem = ""
    try:
        if settings.command:
            call_program(settings.command, request, settings.timeout.total_seconds())
        else:
            _post(runtime, request)
    except ScalerRequestFailed as error:
        problem = str(error)
    if problem:
        service.failed(database, name, request["id"], problem)
        _log.warning("scaler_request_failed", id=request["id"], error=problem)
    else:
        service.accepted(database, name, request["id"])
        _log.info("scaler_asked", **request)
    summary = problem or f"{request['hosts']} hosts of {name}; given up: {', '.join(request['release']) or 'none'}"
    record = AuditRecord(_ACTOR, _ACTION, 1 if problem else 0, target={"class": name}, summary=summary[:500])
    audit_log.add_all(database, [record])
    return not problem


def _post(runtime: Runtime, request: Mapping[str, Any], resolve: Resolve = connections.system_addresses) -> None:
    settings = runtime.settings.scaler
    body, timestamp = json.dumps(request).encode(), int(clock.now().timestamp())
    id_ = f"msg_{request['id']}"
    try:
        secret = runtime.secrets.reveal([settings.secret])[settings.secret].strip()
        signature = webhook_signatures.sign(secret, id_, timestamp, body)
        headers = {"webhook-id": id_, "webhook-timestamp": str(timestamp), "webhook-signature": signature}
        call = HttpCall(
            settings.url,
            method="POST",
            headers=headers,
            body=HttpBody(body, "application/json"),
            timeout=settings.timeout,
            max_bytes=_MAX_ANSWER,
            secrets=(secret,),
        )
        outbound.call(call, settings=runtime.settings.http, on_stop=lambda _: None, resolve=resolve)
    except StepFailure as failure:
        raise ScalerRequestFailed(failure.message) from None
    except UnusableSecret as error:
        raise ScalerRequestFailed(str(error)) from None


def call_program(command: Sequence[str], request: Mapping[str, Any], seconds: float) -> None:
    """Run a program with the request on its standard input. Raises ScalerRequestFailed."""
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        except OSError as error:
            raise ScalerRequestFailed(f"{command[0]} could not be started: {error}") from None
        try:
            process.communicate(json.dumps(request).encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise ScalerRequestFailed(f"{command[0]} did not end within {seconds:g} s") from None
        if process.returncode != 0:
            errors.seek(0)
            told = errors.read(_MAX_ERROR).decode(errors="replace").strip()
            raise ScalerRequestFailed(f"{command[0]} ended with {process.returncode}: {told}")

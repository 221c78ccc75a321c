"""
Hooks over HTTP: a POST for each call, signed as Standard Webhooks, under the egress rules of `http` steps.

https://www.standardwebhooks.com. A receiver checks `webhook-id`, `webhook-timestamp` and `webhook-signature`.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

from app.kernel import clock, ids
from app.kernel.errors import FailureReason, StepFailure
from app.kernel.sections.hooks import HookDefinition
from app.kernel.sections.http import HttpSettings
from app.kernel.security import webhook_signatures
from app.kernel.security.secrets import Secrets
from app.kernel.security.webhook_signatures import UnusableSecret
from app.workflows.http.calls import HttpBody, HttpCall
from workers import outbound
from workers.hooks.processes import HookBroken, HookTimeout, StopSwitch

#: Most bytes of an answer.
_MOST_BYTES = 16 * 1024 * 1024


def call(hook: HookDefinition, document: Any, secrets: Secrets, settings: HttpSettings, stop: StopSwitch) -> Any:
    """Return the answer of a server, which is JSON. Raises HookBroken, HookTimeout, CancelledError."""
    assert hook.url is not None, "settings require it"
    body = json.dumps(document).encode()
    id_, timestamp = f"msg_{ids.new_id().hex}", int(clock.now().timestamp())
    headers = {"webhook-id": id_, "webhook-timestamp": str(timestamp)}
    try:
        values = secrets.reveal([] if hook.secret is None else [hook.secret])
        if hook.secret is not None:
            headers["webhook-signature"] = webhook_signatures.sign(values[hook.secret], id_, timestamp, body)
        request = HttpCall(
            hook.url,
            method="POST",
            headers=headers,
            body=HttpBody(body, "application/json"),
            timeout=max(hook.timeout, timedelta(milliseconds=50)),
            max_bytes=_MOST_BYTES,
            secrets=tuple(values.values()),
        )
        response = outbound.call(request, settings=settings, on_stop=stop.stops_by)
    except UnusableSecret as error:
        raise HookBroken(str(error)) from None
    except StepFailure as failure:
        if failure.reason is FailureReason.TIMEOUT:
            raise HookTimeout(f"it did not answer within {hook.timeout.total_seconds():g} s") from None
        # The message has the address and the status, but may quote the answer, which may quote the prompt.
        status = "" if failure.status is None else f" with the status {failure.status}"
        why = failure.message if failure.status is None else f"{failure.reason}{status}"
        raise HookBroken(why[:300]) from None
    finally:
        stop.stops_by(None)
    if response.body is not None and not isinstance(response.body, dict):
        raise HookBroken("its answer is no JSON object")
    return response.body

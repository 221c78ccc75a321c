"""
The lines of the output file and the error file of a batch, in OpenAI's form. An id is that of a step.

A request that was answered is in the output file, every other one in the error file: none is in both, none is missing.
"""

from __future__ import annotations

import json
from typing import Any

from app.inference.batches.batch import LINE_PREFIX
from app.inference.openai import failures

#: By how a batch ended: the code and the message of requests that were not done.
_UNDONE = {
    "expired": ("batch_expired", "this request was not done before the completion window of the batch was over"),
    "cancelled": ("batch_cancelled", "the batch was cancelled before this request was done"),
    "failed": ("batch_failed", "the run of the batch failed before this request was done"),
}


def answered(id_: str, custom_id: str, output: str) -> bytes:
    """The line of a request with its answer, which is JSON already."""
    head = json.dumps(
        {"id": _line_id(id_), "custom_id": custom_id, "response": {"status_code": 200, "request_id": id_}},
        ensure_ascii=False,
    )
    # The answer is not parsed only to be written again.
    return f'{head[:-2]}, "body": {output}}}, "error": null}}\n'.encode()


def failed(id_: str, custom_id: str, reason: str, message: str) -> bytes:
    """The line of a request that failed."""
    status, body = failures.of_failure(reason, message)
    return _line(id_, custom_id, {"status_code": status, "request_id": id_, "body": body}, None)


def undone(id_: str, custom_id: str, ending: str) -> bytes:
    """The line of a request that was not done, by how the batch ended."""
    code, message = _UNDONE[ending]
    return _line(id_, custom_id, None, {"code": code, "message": message})


def _line(id_: str, custom_id: str, response: Any, error: Any) -> bytes:
    document = {"id": _line_id(id_), "custom_id": custom_id, "response": response, "error": error}
    return f"{json.dumps(document, ensure_ascii=False)}\n".encode()


def _line_id(id_: str) -> str:
    return f"{LINE_PREFIX}{id_.replace('-', '')}"

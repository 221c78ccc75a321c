"""
The program that describes or calls a Python tool, in a child process.

Its arguments are `describe` or `call`, the name of the tool, the id of the call, and optionally the most mebibytes of
its address space.

A tool is a shipped function (`SHIPPED`) or an entry point of the group `arriero.tools`: a function with annotated
arguments and a docstring. It is code of the installation, and trusted as such. It runs in a process of its own, which
ends with the call.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from importlib import metadata
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ArgsKwargs, to_json

from app.kernel.errors import InvalidInput

GROUP = "arriero.tools"
#: The functions of the shipped library, by name: where each is. An installed package cannot replace them.
SHIPPED = {
    "mail_pdf_text": "app.handoffs.mail.pdf_text:pdf_text",
} | {
    f"real_estate_{name}": f"app.real_estate.{place}"
    for name, place in [
        ("value", "valuation:value"),
        ("forecast", "forecast:forecast"),
        ("lead_sentences", "leads:lead_sentences"),
        ("score_lead", "leads:score_lead"),
        ("read_document", "documents:read_document"),
        ("check_fields", "documents:check_fields"),
        ("reply_facts", "replies:reply_facts"),
        ("check_text", "statements:check_text"),
        ("choose_text", "statements:choose_text"),
    ]
}
#: The variable with the id of the call, which is the same for all its attempts.
CALL_ID = "ARRIERO_CALL_ID"
#: Most bytes of a result.
MAX_RESULT = 4_000_000


def _answer(action: str, name: str, arguments: Any) -> dict[str, Any]:
    shipped = [metadata.EntryPoint(one, place, GROUP) for one, place in SHIPPED.items()]
    points = [*shipped, *metadata.entry_points(group=GROUP)]
    found = [point for point in points if point.name == name]
    if not found:
        known = sorted({point.name for point in points})
        return {"missing": f"no installed package has the entry point {name!r} of the group {GROUP}", "known": known}
    function = found[0].load()
    adapter = TypeAdapter(function)
    if action == "describe":
        return {"description": (function.__doc__ or "").strip(), "parameters": adapter.json_schema()}
    try:
        result = adapter.validate_python(ArgsKwargs((), arguments))
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)[:5]
        return {"invalid": "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in wrong)}
    except InvalidInput as error:
        return {"invalid": "; ".join(str(problem) for problem in error.problems[:5])[:4_000]}
    except Exception as error:  # noqa: BLE001 whatever the tool raises is its answer
        return {"raised": f"{type(error).__name__}: {error}"[:4_000]}
    text = result if isinstance(result, str) else to_json(result).decode()
    if len(text.encode()) > MAX_RESULT:
        return {"raised": f"the result has more than {MAX_RESULT} bytes"}
    return {"result": text, "is_text": isinstance(result, str)}


def main() -> None:
    """Read the arguments as JSON from the standard input, and write the answer as JSON to the standard output."""
    action, name, call_id, *limit = sys.argv[1:]
    if limit and sys.platform == "linux":  # elsewhere the kernel does not enforce it
        most = int(limit[0]) << 20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    # Threads of linear algebra reserve address space, and the worker has as many processes as calls.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # noqa: TID251 OpenBLAS has no other setting
    os.environ[CALL_ID] = call_id  # noqa: TID251 for the tool, which may use it as an idempotency key
    arguments = json.load(sys.stdin) if action == "call" else None
    # What the tool prints must not be taken for the answer.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    channel.write(json.dumps(_answer(action, name, arguments)))
    channel.close()


if __name__ == "__main__":
    main()

"""
The program that describes or calls a Python tool, in a child process.

Its arguments are `describe` or `call`, the name of the tool, and the id of the call.

A tool is an entry point of the group `arriero.tools`: a function with annotated arguments and a docstring. It is code
of the installation, and trusted as such. It runs in a process of its own, which ends with the call.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ArgsKwargs, to_json

GROUP = "arriero.tools"
#: The variable with the id of the call, which is the same for all its attempts.
CALL_ID = "ARRIERO_CALL_ID"
#: Most bytes of a result.
MAX_RESULT = 4_000_000


def _answer(action: str, name: str, arguments: Any) -> dict[str, Any]:
    found = [point for point in metadata.entry_points(group=GROUP) if point.name == name]
    if not found:
        known = sorted({point.name for point in metadata.entry_points(group=GROUP)})
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
    except Exception as error:  # noqa: BLE001 whatever the tool raises is its answer
        return {"raised": f"{type(error).__name__}: {error}"[:4_000]}
    text = result if isinstance(result, str) else to_json(result).decode()
    if len(text.encode()) > MAX_RESULT:
        return {"raised": f"the result has more than {MAX_RESULT} bytes"}
    return {"result": text}


def main() -> None:
    """Read the arguments as JSON from the standard input, and write the answer as JSON to the standard output."""
    action, name, call_id = sys.argv[1:]
    os.environ[CALL_ID] = call_id  # noqa: TID251 for the tool, which may use it as an idempotency key
    arguments = json.load(sys.stdin) if action == "call" else None
    # What the tool prints must not be taken for the answer.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    channel.write(json.dumps(_answer(action, name, arguments)))
    channel.close()


if __name__ == "__main__":
    main()

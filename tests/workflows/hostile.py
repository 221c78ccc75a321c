"""
A child process that reads hostile documents, one after another, with little memory.

It prints the outcome of each as a line of JSON. The kernel kills it when a document uses too much memory or CPU time;
the last line then names that document.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from app import grammar, json_schema
from app.kernel.errors import InvalidInput, StepFailure
from app.workflows.expressions import conditions, templates, transforms
from app.workflows.expressions.templates import Scope
from app.workflows.language import check, inputs, source
from app.workflows.language.definition import Definition

#: Bytes that the process may allocate in addition to its size after the imports.
ROOM = 400 * 1024 * 1024
#: Seconds of CPU time for all documents together; the kernel kills a process that hangs.
CPU = 240

DATA: dict[str, Any] = {
    "inputs": {
        "long": [f"x{i}" for i in range(100_000)],
        "text": "x" * 1_000_000,
        "huge": 10**400,
        "half": "\ud800",
        "items": [{"a": 1, "b": "x"}] * 1000,
        "lists": [[1] * 1000] * 1000,
        "comments": "<!-- -->" * 500_000,
        "letters": "a" * 24 + "b",
    },
    "steps": {},
}
SCOPE = Scope(tuple(DATA["inputs"]), ())


def template(text: str) -> str:
    found = templates.check(text, "t", SCOPE)
    return refused(found) if found else f"gives {len(templates.render(text, DATA))} characters"


def cel(text: str) -> str:
    found = conditions.check(text, "c", SCOPE)
    return refused(found) if found else f"gives {conditions.evaluate_bool(text, DATA)}"


def jmespath(text: str) -> str:
    found = transforms.check_jmespath(text, "j", SCOPE)
    if found:
        return refused(found)
    transforms.evaluate(DATA, jmespath=text)
    return "gives a value"


def read(text: str, syntax: source.Syntax) -> str:
    found = source.read(text, syntax)
    found.line("steps[0].id")
    return "is read"


def definition(text: str) -> str:
    check.parse(text)
    return "is taken"


def schema(value: Any) -> str:
    found = json_schema.problems(value, "s")
    return refused(found) if found else "is a schema"


def forced(value: Any) -> str:
    found = json_schema.problems(value, "s")
    return refused(found) if found else f"makes a grammar of {len(grammar.to_gbnf(value))} characters"


def held(schema: Any, value: Any) -> str:
    """Validate a value against the input schema of a stored definition, which was not checked."""
    stored = Definition.model_validate(
        {"workflow": "w", "inputs": {"x": schema}, "steps": [{"id": "a", "kind": "noop"}]}
    )
    inputs.resolve(stored, {"x": value})
    return "conforms"


def refused(problems: list[Any]) -> str:
    return f"refused: {problems[0].message}"


def tell(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main() -> None:
    sys.set_int_max_str_digits(4300)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU, CPU))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kinds = {made.__name__: made for made in (template, cel, jmespath, read, definition, schema, forced, held)}
    for line in sys.stdin:
        name, kind, arguments = json.loads(line)
        tell({"begun": name})
        begun = time.process_time()
        try:
            became = kinds[kind](*arguments)
        except InvalidInput as error:
            became = refused(list(error.problems))
        except StepFailure as error:
            became = f"fails with {error.reason}: {error.message}"
        except Exception as error:  # noqa: BLE001 the tests look for these
            became = f"CRASH {error!r}"
        tell({"name": name, "became": became[:2000], "seconds": round(time.process_time() - begun, 2)})


if __name__ == "__main__":
    main()

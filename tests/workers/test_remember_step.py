"""`remember` steps: a memory of the run's namespace, once, whatever is repeated."""

from __future__ import annotations

from typing import Any

from sqlalchemy import text

from app.kernel.database import Database
from app.memory.memories import service
from app.memory.memories.store import MemoryFilter
from app.workflows.language import definition as definitions
from app.workflows.runs.service import Runs
from app.workflows.runs.submission import Submission
from workers.memory import remember_step


def run(runs: Runs, fields: dict[str, Any], inputs: dict[str, Any], times: int = 1) -> list[Any]:
    step = {"id": "note", "kind": "remember", **fields}
    document = {"workflow": "notes", "inputs": {name: {} for name in inputs}, "steps": [step]}
    made = runs.submit(Submission(definitions.from_document(document), inputs, namespace="a"))
    with runs.database.work() as work:
        row = work.row(text("SELECT id FROM step WHERE run_id = :id"), {"id": made.id})
    assert row is not None
    claim = runs.claim(row.id, 1, "control")
    assert claim is not None
    return [remember_step.remember(claim.work, claim, runs.database).output for _ in range(times)]  # type: ignore[arg-type] # the step is a remember step


def test_a_step_remembers_once_and_replaces_once(database: Database, runs: Runs) -> None:
    fields = {"text": "{{ inputs.who }} prefers tea", "memory": "preference", "user": "{{ inputs.who }}"}
    first, again = run(runs, fields, {"who": "ana"}, times=2)
    assert (first["created"], again["created"], first["id"] == again["id"]) == (True, False, True)

    changed = {"text": "ana prefers coffee", "user": "ana", "supersedes": "{{ inputs.old }}"}
    second, repeated = run(runs, changed, {"old": first["id"]}, times=2)
    assert (second["created"], repeated["created"], second["id"] == repeated["id"]) == (True, False, True)

    (memory,) = service.page(database, MemoryFilter(namespace="a", user="ana")).memories
    assert (memory.text, memory.kind) == ("ana prefers coffee", "fact")
    assert [(one.origin.value, one.author) for one in memory.sources] == [("run", "notes")]

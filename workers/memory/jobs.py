"""
The job of recall: it has vectors made of passages that have none, by one run at a time.

The run is of the class batch, has one step and contains no texts. The scheduler sees it, so a pool of the embedding
model is started for it. One process at a time does the job, under an advisory lock.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

from app.kernel import log
from app.kernel.errors import ArrieroError, DatabaseUnreachable
from app.memory.recall import vector_index, vectors
from app.memory.recall.vectors import RecallModel
from app.workflows.language import definition as definitions
from app.workflows.runs.submission import Submission
from app.workflows.state_machine.states import FINAL_RUNS, RunState
from workers.passes import alone, in_turn
from workers.runtime import Runtime

_log = log.get(__name__)

#: The workflow of the runs.
WORKFLOW = "recall-vectors"
#: For how long a run that has ended is kept: there will be many.
_RETENTION = timedelta(minutes=10)
#: Vectors of a retired model that one pass removes at most, and those of one transaction.
_REMOVED, _REMOVED_AT_ONCE = 20_000, 2_000
_LOCK = 7_205_759_403_801


def run_recall(runtime: Runtime) -> Mapping[str, object] | None:
    """Do one pass of the job."""
    with in_turn(), alone(runtime.runs.database, _LOCK) as acquired:
        is_active = acquired and advance(runtime)
    if not is_active:
        return None
    runtime.activity.note()
    return {"vectors_are_made": True}


def advance(runtime: Runtime) -> bool:
    """Do what is due. Returns whether something was done, or is under way."""
    database = runtime.runs.database
    target = runtime.settings.recall.embedding_model
    with database.work() as work:
        models = vectors.all_models(work)
    if not target:
        return False
    entry = runtime.catalog.resolve(target)
    name = target if entry is None else entry.name
    own = next((model for model in models if model.name == name), None)
    is_active = _remove_retired(runtime, [model for model in models if model is not own and model.state == "retired"])
    if own is None or own.state == "retired":
        if own is None and not vectors.are_waiting(database):
            return is_active  # nothing was ever said
        with database.work() as work:
            own = vectors.ensure_model(work, name)
        _log.info("recall_model_begins", model=name)
    if not own.is_indexed and own.made >= vector_index.INDEXED_FROM and own.dimensions is not None:
        _log.info("recall_index_begins", model=name, vectors=own.made)
        vector_index.create(database, own.id, own.dimensions, own.made)
        vectors.note_index(database, own, is_indexed=True)
    if entry is None or not entry.serves_embeddings:
        problem = "the catalogue has no such model" if entry is None else "its use_cases have no embed"
        vectors.note(database, own, None, f"{problem} (setting recall.embedding_model)")
        return is_active
    return _have_vectors_made(runtime, own, entry.slug) or is_active


def _have_vectors_made(runtime: Runtime, model: RecallModel, slug: str) -> bool:
    """Submit a run, unless one is under way or there is nothing to do. Returns whether one is."""
    database = runtime.runs.database
    if model.run_id is not None:
        run = vectors.state_of_run(database, model.run_id)
        if run is not None and run.state not in FINAL_RUNS:
            return True
        if run is not None and run.state != RunState.SUCCEEDED and not run.is_old:
            vectors.note(database, model, model.run_id, str((run.error or {}).get("message", run.state)))
            return False  # not again at once
    is_wanted = runtime.recall.take_note(slug)
    if not (model.state == "building" or vectors.are_waiting(database) or is_wanted):
        return False
    step = {"id": "passages", "kind": "embed_passages", "model": model.name, "timeout": "10m"}
    definition = definitions.from_document({"workflow": WORKFLOW, "priority": "batch", "steps": [step]})
    try:
        accepted = runtime.runs.submit(Submission(definition, {}, retention=_RETENTION))
    except DatabaseUnreachable:
        raise
    except ArrieroError as error:
        vectors.note(database, model, None, str(error))
        return False
    vectors.note(database, model, accepted.id, None)
    return True


def _remove_retired(runtime: Runtime, models: list[RecallModel]) -> bool:
    database = runtime.runs.database
    for model in models:
        removed = 0
        while removed < _REMOVED:
            current = vectors.reread(database, model)
            if current is None or current.state != "retired":
                break
            found = vectors.remove_some(database, current, _REMOVED_AT_ONCE)
            removed += found
            if found < _REMOVED_AT_ONCE:
                vector_index.drop(database, model.id)
                vectors.forget_model(database, model)
                _log.info("recall_model_removed", model=model.name)
                break
    return bool(models)

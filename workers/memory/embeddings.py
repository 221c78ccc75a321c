"""
The execution of `embed_passages` steps: a pool makes vectors of passages that have none.

The texts are read from the database batch by batch, and each batch is stored in one transaction; so a step that is
stopped or dies has stored all but its last batch, and no run contains the texts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from datetime import timedelta

from app.inference.requests import PriorityClass
from app.kernel import log
from app.kernel.database import Database
from app.kernel.errors import FailureReason, StepFailure
from app.memory.recall import vectors
from app.memory.recall.passages import embedded_text
from app.memory.recall.vectors import MissingVector, MissingVectors, RecallModel
from app.workflows.state_machine.outcomes import Success, TokenUsage
from workers import embedding_step
from workers.engine import Engine, OnStop
from workers.memory.model_file import LoadedModelFile

_log = log.get(__name__)

#: Passages of one transaction.
BATCH = 64


def embed_passages(
    database: Database,
    engine: Engine,
    model: str,
    most: int,
    *,
    on_stop: OnStop,
    timeout: timedelta,
    priority: PriorityClass = PriorityClass.BATCH,
    file: str | None = None,
) -> Success:
    """
    Make vectors of up to `most` passages. The output has their number, and whether more are left.

    `file` is the hash of the model file that the engine has loaded; None: it is not known.

    Raises StepFailure, and CancelledError when the step was cancelled.
    """
    stopped = threading.Event()
    on_stop(stopped.set)
    until = time.monotonic() + timeout.total_seconds()
    done = tokens = 0
    while done < most:
        if stopped.is_set():
            raise CancelledError
        own = vectors.find_model(database, model)
        if own is None or own.state == "retired":
            break
        _require_present_file(database, own, file)
        batch = vectors.missing(database, own, min(BATCH, most - done))
        if not batch.passages:
            if own.state == "building":
                vectors.finish(database, own)
            return Success({"passages": done, "more": False}, TokenUsage(tokens_in=tokens))
        left = timedelta(seconds=max(0.0, until - time.monotonic()))
        try:
            made, used = _made(engine, batch.passages, on_stop, left, priority)
        except StepFailure as error:
            if error.reason in (FailureReason.TIMEOUT, FailureReason.WORKER_STOPPED):
                raise
            made, used = _made_one_by_one(database, engine, batch, on_stop, left, priority)
        done += len(batch.passages)
        tokens += used
        if made:
            _require_same_dimensions(own, made)
            vectors.store(database, own, batch, made)
    return Success({"passages": done, "more": True}, TokenUsage(tokens_in=tokens))


def _made(
    engine: Engine, passages: Sequence[MissingVector], on_stop: OnStop, left: timedelta, priority: PriorityClass
) -> tuple[dict[int, list[float]], int]:
    texts = [embedded_text(one.text, one.speaker) for one in passages]
    found = embedding_step.embed(texts, engine, on_stop=on_stop, timeout=left, priority=priority)
    return dict(zip((one.id for one in passages), found.output, strict=True)), found.usage.tokens_in


def _made_one_by_one(
    database: Database,
    engine: Engine,
    batch: MissingVectors,
    on_stop: OnStop,
    left: timedelta,
    priority: PriorityClass,
) -> tuple[dict[int, list[float]], int]:
    """Make vectors of a batch that failed. One text does not keep the others from theirs: its failure is stored."""
    made: dict[int, list[float]] = {}
    tokens = 0
    failed: dict[int, StepFailure] = {}
    for passage in batch.passages:
        try:
            one, used = _made(engine, (passage,), on_stop, left, priority)
        except StepFailure as error:
            failed[passage.id] = error
        else:
            made |= one
            tokens += used
    if not made:
        raise next(iter(failed.values()))  # nothing works: the engine is at fault, not the texts
    for id_, failure in failed.items():
        _log.warning("passage_not_embedded", passage=id_, error=failure.message)
        vectors.refuse(database, id_, failure.message)
    return made, tokens


def note_file(database: Database, model: str, loaded: LoadedModelFile) -> None:
    """Note which file of a model a pool has loaded, if recall uses the model."""
    if vectors.find_model(database, model) is None or (file := loaded.digest()) is None:
        return
    if vectors.note_file(database, model, file):
        _log.warning("embedding_model_file_replaced", model=model, file=file)


def _require_present_file(database: Database, model: RecallModel, file: str | None) -> None:
    """Raises StepFailure in a pool that has loaded an earlier file of the model."""
    if file is not None and model.file is None:
        vectors.note_file(database, model.name, file)
    elif file is not None and file != model.file:
        message = f"this pool of {model.name} has an earlier file of the model than another one: restart it"
        raise StepFailure(FailureReason.INVALID_REQUEST, message)


def _require_same_dimensions(model: RecallModel, made: dict[int, list[float]]) -> None:
    size = len(next(iter(made.values())))
    if model.dimensions is not None and size != model.dimensions:
        message = (
            f"{model.name} makes vectors of {size} numbers, and those that are stored have {model.dimensions}: "
            "it was replaced; give the new one a name of its own in the catalogue"
        )
        raise StepFailure(FailureReason.INVALID_REQUEST, message)

"""
What clients do with batches: create, look, cancel.

Nothing here waits for a file to be read or for requests to stop: the job of batches does that (`advance.py`), and is
woken after each change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from uuid import UUID

from app.files import storage
from app.files.file import FilePurpose, parsed_id, shown_id
from app.inference.batches import store
from app.inference.batches.batch import PREFIX, BatchState
from app.inference.batches.rows import StoredBatch
from app.inference.batches.tasks import BATCHES
from app.kernel import ids
from app.kernel.broker import CONTROL_QUEUE, PRIORITIES, Publisher
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import Conflict, InvalidInput, NotFound, Problem

#: Seconds after which a wake-up that no worker has received is dropped: the job runs by itself.
_WAKE_EXPIRES = 30.0


@dataclass(frozen=True, slots=True)
class NewBatch:
    """What a client says of a new batch."""

    endpoint: str
    #: As the client sent it.
    input_file_id: str
    #: As the client wrote it, and what it means.
    completion_window: str
    window: timedelta
    metadata: Mapping[str, str] | None = None
    #: For how long its results are kept; None for the setting.
    keep: timedelta | None = None


@dataclass(frozen=True, slots=True)
class BatchPage:
    """A part of the list of batches, the newest first."""

    batches: list[StoredBatch]
    has_more: bool


def create(
    database: Database, publisher: Publisher, request: NewBatch, namespace: str | None, max_open: int
) -> StoredBatch:
    """
    Write a batch for a file of a namespace, or of any; the batch belongs to the namespace of its file.

    Raises InvalidInput for a file that is not there or not for batches, and Conflict when too many batches are open.
    """
    with database.work() as work:
        try:
            file = storage.get_in(work, parsed_id(request.input_file_id), namespace, request.input_file_id, hold=True)
        except NotFound as error:
            raise InvalidInput(
                [Problem("input_file_id", str(error), "the id of an uploaded file")], "request"
            ) from None
        if file.purpose != FilePurpose.BATCH:
            message = f"the purpose of {request.input_file_id} is {file.purpose!r}"
            raise InvalidInput([Problem("input_file_id", message, "a file with the purpose 'batch'")], "request")
        values = {
            "id": ids.new_id(),
            "namespace": file.namespace,
            "endpoint": request.endpoint,
            "input_file_id": file.id,
            "completion_window": request.completion_window,
            "metadata": None if request.metadata is None else dict(request.metadata),
            "keep_s": None if request.keep is None else round(request.keep.total_seconds()),
            "window": request.window,
        }
        made = store.insert(work, values, max_open)
        if made is None:
            raise Conflict(
                f"the namespace {file.namespace!r} has {max_open} batches that have not ended, and no more are "
                "accepted (setting batches.max_open)"
            )
    wake(publisher)
    return made


def get(database: Database, shown: str, namespace: str | None) -> StoredBatch:
    """Return a batch of a namespace, or of any, with what its run has done so far. Raises NotFound."""
    with database.work() as work:
        (found,) = _with_progress(work, [_require(work, shown, namespace)])
    return found


def page(database: Database, namespace: str | None, after: str | None, limit: int) -> BatchPage:
    """Return batches of a namespace, or of all. Raises NotFound when there is no batch `after`."""
    with database.work() as work:
        last = None if after is None else _require(work, after, namespace).id
        found = store.page(work, namespace, last, limit + 1)
        return BatchPage(_with_progress(work, found[:limit]), len(found) > limit)


def cancel(database: Database, publisher: Publisher, shown: str, namespace: str | None) -> StoredBatch:
    """
    Cancel a batch; one that is being cancelled stays as it is.

    Raises NotFound, and Conflict when it has ended or its results are being written.
    """
    with database.work() as work:
        batch = _require(work, shown, namespace, lock=True)
        match batch.state:
            case BatchState.VALIDATING:
                moved = store.move(work, batch.id, [BatchState.VALIDATING], BatchState.CANCELLED)
            case BatchState.IN_PROGRESS:
                ending = BatchState.CANCELLED.value
                moved = store.move(work, batch.id, [BatchState.IN_PROGRESS], BatchState.CANCELLING, ending=ending)
            case BatchState.CANCELLING:
                moved = batch
            case state:
                raise Conflict(f"the batch {shown} is {state}, and can no more be cancelled")
        assert moved is not None, "it is locked"
        (found,) = _with_progress(work, [moved])
    wake(publisher)
    return found


def require_unused(work: UnitOfWork, file_id: UUID) -> None:
    """Raise Conflict when a batch that has not ended reads the file."""
    if file_id in store.used_files(work):
        message = "is the input of a batch that has not ended; cancel the batch first"
        raise Conflict(f"{shown_id(file_id)} {message}")


def wake(publisher: Publisher) -> None:
    """Make the job of batches run soon."""
    publisher.publish(BATCHES, [], queue=CONTROL_QUEUE, priority=PRIORITIES["interactive"], expires=_WAKE_EXPIRES)


def _require(work: UnitOfWork, shown: str, namespace: str | None, *, lock: bool = False) -> StoredBatch:
    id_ = parsed_id(shown, PREFIX)
    found = None if id_ is None else store.find(work, id_, lock=lock)
    if found is None or (namespace is not None and found.namespace != namespace):
        raise NotFound("batch", shown)
    return found


def _with_progress(work: UnitOfWork, batches: list[StoredBatch]) -> list[StoredBatch]:
    """The batches, those that have not ended with the counts of their runs."""
    counts = store.progress(work, [batch.id for batch in batches if batch.is_open])
    return [
        replace(batch, completed=count.completed, failed=count.failed) if (count := counts.get(batch.id)) else batch
        for batch in batches
    ]

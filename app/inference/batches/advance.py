"""
The progress of batches: their files are validated, their runs submitted, expired or cancelled, their results written.

One process at a time works on a batch, under a lease; after its death another one begins that part again. The run is
submitted in the transaction that ends the validation, and the results become visible in the one that ends the batch, so
nothing is done twice. A batch that raises is left for later, and does not stop the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from app.access import namespaces
from app.catalog.catalog import Catalog
from app.files import storage
from app.files.file import FilePurpose, shown_id
from app.files.storage import FileWriter
from app.inference.batches import models, results, store
from app.inference.batches.batch import PREFIX, WORKFLOW, BatchState
from app.inference.batches.models import ModelLines
from app.inference.batches.rows import StoredBatch
from app.inference.batches.validation import InputCheck
from app.inference.routing import fleet
from app.inference.routing.availability import NOTHING_KNOWN
from app.inference.routing.choice import NoModelAvailable
from app.kernel import log
from app.kernel.errors import (
    ArrieroError,
    BudgetUsedUp,
    DatabaseUnreachable,
    FailureReason,
    InvalidInput,
    NotFound,
    PayloadTooLarge,
)
from app.kernel.sections.files import BatchSettings, FileSettings
from app.workflows.language import definition as definitions
from app.workflows.language.definition import Definition, RoutedDefinition
from app.workflows.runs import submission
from app.workflows.runs.service import Runs
from app.workflows.runs.storage import payloads, values
from app.workflows.runs.submission import Prepared, Submission
from app.workflows.state_machine.states import FINAL_RUNS, RunState, StepState

_log = log.get(__name__)

#: The lease of a process on a batch. It is renewed after each part of the work.
_LEASE = timedelta(seconds=30)
#: Lines whose results are read at a time: at most so many answers are in memory.
_PAGE = 200
#: The time limit of one attempt of a request: it may stand still for long while its model has more urgent work.
_TIMEOUT = "1d"


class BatchLost(ArrieroError):
    """Another process works on the batch, or it was cancelled meanwhile."""


@dataclass(frozen=True, slots=True)
class Batches:
    """The progress of all batches."""

    runs: Runs
    catalog: Callable[[], Catalog]
    files: FileSettings
    settings: BatchSettings
    #: This process.
    owner: str

    def advance_all(self) -> int:
        """Do what is due for each batch; returns for how many."""
        with self.runs.database.work() as work:
            due = store.due_ids(work)
        for id_ in due:
            self._advance_guarded(id_)
        return len(due)

    def _advance_guarded(self, id_: UUID) -> None:
        try:
            self.advance(id_)
        except DatabaseUnreachable:
            raise
        except BatchLost as error:
            _log.info("batch_lost", batch_id=str(id_), reason=str(error))
            self._release(id_)
        except Exception:  # noqa: BLE001 one batch must not stop the others; it is tried again when its lease is over
            _log.exception("batch_failed_to_advance", batch_id=str(id_))

    def advance(self, id_: UUID) -> None:
        """Do what is due for a batch. Raises BatchLost, and what its work raises: the lease then stays for a while."""
        with self.runs.database.work() as work:
            batch = store.claim(work, id_, self.owner, _LEASE)
            run = None if batch is None else store.run_state(work, id_)
        if batch is None:
            return
        if batch.state == BatchState.VALIDATING:
            self._validate(batch)
        elif run is not None and run[0] not in FINAL_RUNS:
            self._stop(batch)
        else:
            self._finish(batch, "failed" if run is None else run[0])
        self._release(id_)

    def _release(self, id_: UUID) -> None:
        with self.runs.database.work() as work:
            store.release(work, id_, self.owner)

    def _validate(self, batch: StoredBatch) -> None:
        check = InputCheck(
            batch.endpoint,
            lambda model: models.problem_of_model(self.catalog(), model, batch.endpoint),
            max_lines=self.settings.max_lines,
            max_line_bytes=self.settings.max_line_bytes,
        )
        for part in storage.parts(self.runs.database, batch.input_file_id):
            check.feed(part)
            self._renew(batch)
            if check.is_over:
                break
        check.finish()
        if check.errors:
            self._refuse(batch, check.errors, check.total)
            return
        try:
            lines = self._chosen(check)
            prepared = self._prepared(batch, lines)
            if self.runs.afford is not None:
                self.runs.afford(prepared, None)
        except BudgetUsedUp as error:
            refused = {"code": "budget_used_up", "line": None, "message": str(error), "param": None}
            self._refuse(batch, [refused], check.total)
            return
        except (InvalidInput, NotFound, NoModelAvailable, PayloadTooLarge) as error:
            is_unavailable = isinstance(error, NoModelAvailable)
            code = "model_not_available" if is_unavailable else "invalid_request"
            refused = {"code": code, "line": None, "message": str(error), "param": None}
            self._refuse(batch, [refused], check.total)
            return
        names = list(lines)
        with self.runs.transaction() as transaction:
            before, begun = [BatchState.VALIDATING], BatchState.IN_PROGRESS
            changes = {"models": names, "total": check.total, "owner": self.owner}
            if store.move(transaction.work, batch.id, before, begun, **changes) is None:
                raise BatchLost("it was cancelled, or another process has its lease")
            submission.create(transaction, prepared)
        _log.info("batch_begun", batch_id=str(batch.id), lines=check.total, models=names)

    def _refuse(self, batch: StoredBatch, errors: list[dict[str, Any]], total: int) -> None:
        with self.runs.database.work() as work:
            changes = {"errors": errors, "total": total, "owner": self.owner}
            store.move(work, batch.id, [BatchState.VALIDATING], BatchState.FAILED, **changes)
        _log.info("batch_refused", batch_id=str(batch.id), errors=len(errors))

    def _chosen(self, check: InputCheck) -> dict[str, ModelLines]:
        """The requests of each model. Raises NotFound, InvalidInput, NoModelAvailable."""
        catalog = self.catalog()
        known = fleet.read(self.runs.database, catalog) if models.has_selectors(check.lines) else NOTHING_KNOWN
        return models.chosen_lines(check.lines, check.contexts, catalog, known)

    def _prepared(self, batch: StoredBatch, lines: dict[str, ModelLines]) -> Prepared:
        labels = {} if batch.namespace == namespaces.DEFAULT else {namespaces.LABEL: batch.namespace}
        definition = definition_of(list(lines), self.settings.max_parallel)
        inputs = {map_key(n): of_model.lines for n, of_model in enumerate(lines.values())}
        chosen = {map_key(n): one.choice(name) for n, (name, one) in enumerate(lines.items()) if one.asked}
        request = Submission(definition, inputs, labels=labels, retention=self.settings.keep_runs, id=batch.id)
        return submission.prepare(request, self.runs.policy, route=lambda given: RoutedDefinition(given, chosen))

    def _stop(self, batch: StoredBatch) -> None:
        """Stop the run of a batch that is to end."""
        if batch.state == BatchState.IN_PROGRESS:
            if not batch.late:
                return
            ending = BatchState.EXPIRED.value
            with self.runs.database.work() as work:
                before, after = [BatchState.IN_PROGRESS], BatchState.FINALIZING
                if store.move(work, batch.id, before, after, ending=ending, owner=self.owner) is None:
                    raise BatchLost("it was cancelled, or another process has its lease")
            message = "the completion window of the batch is over"
        else:
            message = "the batch was cancelled" if batch.ending == BatchState.CANCELLED else "the batch has expired"
        self.runs.cancel(batch.id, message=message)

    def _finish(self, batch: StoredBatch, run_state: str) -> None:
        """Write the results of a batch whose run has ended."""
        if batch.state == BatchState.IN_PROGRESS:
            with self.runs.database.work() as work:
                before, after = [BatchState.IN_PROGRESS], BatchState.FINALIZING
                if store.move(work, batch.id, before, after, owner=self.owner) is None:
                    raise BatchLost("it was cancelled, or another process has its lease")
        ending = _ending(batch, run_state)
        outcome = _Results(self, batch, ending)
        try:
            outcome.write()
            outcome.finish()
        except BaseException:
            with suppress(ArrieroError):  # what stays is removed by the job that removes expired files
                outcome.discard()
            raise
        _log.info("batch_ended", batch_id=str(batch.id), state=ending, completed=outcome.done, failed=outcome.failed)

    def _renew(self, batch: StoredBatch) -> None:
        with self.runs.database.work() as work:
            if not store.renew(work, batch.id, self.owner, _LEASE):
                raise BatchLost("another process has its lease")


class _Results:
    """The files with the results of one batch."""

    def __init__(self, batches: Batches, batch: StoredBatch, ending: BatchState) -> None:
        self._batches, self._batch, self._ending = batches, batch, ending
        self._database = batches.runs.database
        self._output: FileWriter | None = None
        self._errors: FileWriter | None = None
        self.done = self.failed = 0

    def write(self) -> None:
        """Write a line for each request."""
        with self._database.work() as work:
            inputs, maps = values.inputs(work, self._batch.id), store.maps(work, self._batch.id)
        for number in range(len(self._batch.models or ())):
            key = map_key(number)
            lines: Sequence[Any] = inputs.get(key, [])
            for first in range(0, len(lines), _PAGE):
                page = lines[first : first + _PAGE]
                answers, errors = bytearray(), bytearray()
                for is_answer, line in self._lines(maps.get(key), first, page):
                    (answers if is_answer else errors).extend(line)
                self._append(answers, errors)
                self._batches._renew(self._batch)

    def _lines(self, map_id: UUID | None, first: int, page: Sequence[Any]) -> Iterator[tuple[bool, bytes]]:
        """Whether each request was answered, and its line."""
        with self._database.work() as work:
            found = {} if map_id is None else store.items(work, map_id, first, first + len(page))
            for index, (*_, custom_id) in enumerate(page, start=first):
                item = found.get(index)
                if item is not None and item.state == StepState.SUCCEEDED:
                    output = payloads.text_of(work, item.output, item.output_sha256)
                    self.done += 1
                    yield True, results.answered(str(item.id), custom_id, output or "null")
                elif item is not None and item.state == StepState.FAILED:
                    error = item.error or {}
                    self.failed += 1
                    reason, message = error.get("reason", FailureReason.INTERNAL), error.get("message", "it failed")
                    yield False, results.failed(str(item.id), custom_id, reason, message)
                else:
                    ending = self._ending if self._ending != BatchState.COMPLETED else BatchState.FAILED
                    id_ = str(self._batch.id if item is None else item.id)
                    yield False, results.undone(id_, custom_id, ending.value)

    def _append(self, answers: bytearray, errors: bytearray) -> None:
        namespace = self._batch.namespace
        if answers:
            self._output = self._output or FileWriter(self._database, namespace, None)
            self._output.write(bytes(answers))
        if errors:
            self._errors = self._errors or FileWriter(self._database, namespace, None)
            self._errors.write(bytes(errors))

    def finish(self) -> None:
        """Make the files visible and end the batch, in one transaction. Raises BatchLost."""
        batch, keep = self._batch, self._batches.files.keep
        if batch.keep_s is not None:
            keep = timedelta(seconds=batch.keep_s)
        name, purpose = shown_id(batch.id, PREFIX), FilePurpose.BATCH_OUTPUT.value
        with self._database.work() as work:
            changes: dict[str, Any] = {"completed": self.done, "failed": self.failed, "owner": self._batches.owner}
            if self._output is not None:
                changes["output_file_id"] = self._output.finish(f"{name}_output.jsonl", purpose, keep, work).id
            if self._errors is not None:
                changes["error_file_id"] = self._errors.finish(f"{name}_error.jsonl", purpose, keep, work).id
            before = [BatchState.FINALIZING, BatchState.CANCELLING]
            if store.move(work, batch.id, before, self._ending, **changes) is None:
                raise BatchLost("another process has its lease")

    def discard(self) -> None:
        """Remove what was written."""
        for writer in (self._output, self._errors):
            if writer is not None:
                writer.discard()


def map_key(number: int) -> str:
    """The key of the map of a model, and the name of the input with its lines."""
    return f"lines_{number}"


def definition_of(models: Sequence[str], max_parallel: int) -> Definition:
    """The workflow of batches with these models: a map for each, whose items are the lines of the file."""
    keys = [map_key(number) for number in range(len(models))]
    return definitions.from_document(
        {
            "workflow": WORKFLOW,
            "priority": "batch",
            "inputs": {key: {} for key in keys},
            "steps": [
                {
                    "id": key,
                    "kind": "map",
                    "over": f"inputs.{key}",
                    "max_parallel": max_parallel,
                    "on_error": "collect",
                    "step": {"kind": "openai", "model": model, "request": "item", "timeout": _TIMEOUT},
                }
                for key, model in zip(keys, models, strict=True)
            ],
            # The results are in files: together they may be longer than an output can be.
            "outputs": {"done": "true"},
        }
    )


def _ending(batch: StoredBatch, run_state: str) -> BatchState:
    if run_state == RunState.SUCCEEDED:
        # A batch whose last request ended while it was to be stopped is complete, unless its client has cancelled it.
        return BatchState.CANCELLED if batch.ending == BatchState.CANCELLED else BatchState.COMPLETED
    if batch.ending is not None:
        return BatchState(batch.ending)
    return BatchState.CANCELLED if run_state == RunState.CANCELLED else BatchState.FAILED

"""
The splits that assign now, as one process knows them, and what they make of calls and submissions.

A call never waits for the database: an API process reads the table at its start and after each change. Other processes
read it when they submit a run and have not done so for a second.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

from app.access import namespaces
from app.catalog.catalog import Catalog
from app.catalog.model import Model
from app.inference.splits import assignment, definition, store
from app.inference.splits.assignment import ActiveSplit, Assigned
from app.inference.splits.definition import SplitCandidate
from app.inference.splits.rows import StoredSplit
from app.kernel import ids, log
from app.kernel.database import Database
from app.kernel.errors import ArrieroError, DatabaseUnreachable, InvalidInput
from app.workflows import registry
from app.workflows.language import definition as definitions
from app.workflows.language.overrides import with_models
from app.workflows.language.source import SourceDocument
from app.workflows.runs import submission as submissions
from app.workflows.runs.submission import Submission

_log = log.get(__name__)

#: Seconds for which a process that is told of no changes uses what it has read.
_FRESH = 1.0


def active(stored: StoredSplit) -> ActiveSplit:
    """Return a stored split as it assigns."""
    found = definition.parse(stored.definition)
    share = (
        stored.share if stored.share is not None else float(found.ramp[min(stored.stage, len(found.ramp) - 1)].share)
    )
    return ActiveSplit(str(stored.id), found, share)


@dataclass(slots=True)
class SplitTable:
    """The splits of this moment. Safe for threads."""

    database: Database
    #: Whether somebody calls `refresh` after each change.
    is_told: bool = False
    _splits: tuple[ActiveSplit, ...] = ()
    _read: float = float("-inf")
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def refresh(self) -> None:
        """Read the splits. While the database does not answer, nothing changes; this is logged."""
        with self._lock:
            try:
                with self.database.work() as work:
                    found = store.running(work)
            except DatabaseUnreachable as error:
                _log.warning("splits_not_read", error=str(error))
                return
            self._splits = tuple(_readable(found))
            self._read = time.monotonic()

    def of_call(self, model: str, namespace: str, catalog: Catalog) -> ActiveSplit | None:
        """Return the split of the calls of a model, given by its name."""
        for split in self._splits:
            target = split.definition.model
            if target is not None and split.holds_in(namespace):
                found = catalog.resolve(target)
                if found is not None and found.name == model:
                    return split
        return None

    def submission(self, request: Submission) -> Submission:
        """
        Return a submission as its split assigns it: with the variant's version or models, and the labels that say so.

        A submission that names a version or models of its own is not divided. A candidate that cannot run, because its
        version was removed, leaves the submission as it is: it is logged, and counts for no variant.
        """
        if not request.newest or request.models or request.assigned:
            return request
        if not self.is_told and time.monotonic() - self._read > _FRESH:
            self.refresh()
        namespace = submissions.namespace_of(request)
        for split in self._splits:
            if split.definition.workflow == request.definition.workflow and split.holds_in(namespace):
                try:
                    return self._assigned(split, request, namespace)
                except (ArrieroError, ValueError) as error:
                    _log.warning("split_not_applied", split=split.name, error=str(error))
        return request

    def _assigned(self, split: ActiveSplit, request: Submission, namespace: str) -> Submission:
        labels = {**request.definition.labels, **request.labels}
        unit = assignment.unit_of_run(split.definition.unit, labels)
        run_id = request.id or ids.new_id()
        found = assignment.assign(split, namespace, unit, str(run_id), labels.get("user"))
        changed = replace(request, id=run_id, assigned=found.labels)
        candidate = found.candidate
        if candidate is None:
            return changed
        if candidate.version is not None:
            version = registry.get(self.database, request.definition.workflow, candidate.version, namespace=namespace)
            changed = replace(changed, definition=version.definition, version=version.version)
        if candidate.models:
            document = with_models(SourceDocument(changed.definition.document(), {}), candidate.models)
            changed = replace(changed, definition=definitions.from_document(document.data), version=None)
        return changed


@dataclass(frozen=True, slots=True)
class DividedCall:
    """A call as its split assigns it."""

    model: Model
    body: Mapping[str, Any]
    assigned: Assigned


def divide(
    split: ActiveSplit, body: Mapping[str, Any], model: Model, namespace: str, run_id: UUID, catalog: Catalog
) -> DividedCall | None:
    """
    Assign a call of OpenAI's form, and change it as the variant says.

    None when the candidate's model is not in the catalogue: the call is not divided, and this is logged.
    """
    unit = assignment.unit_of_call(split.definition.unit, body)
    found = assignment.assign(split, namespace, unit, str(run_id), assignment.user_of_call(body))
    candidate = found.candidate
    if candidate is None:
        return DividedCall(model, body, found)
    other = model if candidate.model is None else catalog.resolve(candidate.model)
    if other is None:
        _log.warning("split_not_applied", split=split.name, error=f"the catalogue has no model {candidate.model!r}")
        return None
    return DividedCall(other, changed_body(body, candidate), found)


def changed_body(body: Mapping[str, Any], candidate: SplitCandidate) -> Mapping[str, Any]:
    """Return the body of a call with the fields of a candidate; a system message only for one that has messages."""
    changed = {**body, **candidate.set}
    if "max_tokens" in candidate.set or "max_completion_tokens" in candidate.set:
        for name in {"max_tokens", "max_completion_tokens"} - set(candidate.set):
            changed.pop(name, None)
    messages = body.get("messages")
    if candidate.system is not None and isinstance(messages, list):
        others = [one for one in messages if one.get("role") not in ("system", "developer")]
        changed["messages"] = [{"role": "system", "content": candidate.system}, *others]
    return changed


def namespace_of(labels: Mapping[str, str]) -> str:
    """Return the namespace of a call with these labels."""
    return labels.get(namespaces.LABEL, namespaces.DEFAULT)


def _readable(stored: list[StoredSplit]) -> list[ActiveSplit]:
    found = []
    for one in stored:
        try:
            found.append(active(one))
        except InvalidInput as error:  # after a change of version
            _log.error("split_not_applied", split=one.name, error=str(error))
    return found

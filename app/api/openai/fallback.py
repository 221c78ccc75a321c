"""
Fallbacks of calls: which model answers a call, and which are tried after it.

A name or an alias costs nothing. A selector is decided, and models are passed over, by what was read of the fleet at
most a second ago. The next model is tried when one fails, or has no token within its `max_wait`, before any text was
sent, never after. Each try is a run; which one answers is told in the headers, in the stream, and in the labels of its
run.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any
from uuid import UUID

from app.access.callers import Caller
from app.api import threads
from app.api.openai.errors import ModelNotFound
from app.api.openai.road import Road, Waiting
from app.api.services import Services
from app.catalog.model import Model
from app.catalog.serving import selector as selectors
from app.inference.direct import DirectRequest
from app.inference.routing import choice
from app.inference.routing.availability import NOTHING_KNOWN, FleetAvailability
from app.inference.splits import table as splits
from app.inference.splits.table import DividedCall
from app.inference.token_stream import EntryKind, StreamEntry
from app.kernel import clock, ids, log
from app.kernel.errors import DatabaseUnreachable, FailureReason, NotFound

_log = log.get(__name__)

#: Labels of a run: what the client asked for, why this model answers, and the run that was tried before.
ASKED, REASON, AFTER = "model_asked", "model_reason", "fallback_after"
#: Headers of the answer.
MODEL_HEADER, REASON_HEADER = "X-Arriero-Model", "X-Arriero-Reason"
#: Most characters of a reason in a header or a label.
_REASON = 200


class RoutedCall:
    """A call on its way to a model."""

    def __init__(
        self, services: Services, road: Road, caller: Caller, document: Mapping[str, Any], asked: str, priority: str
    ) -> None:
        """
        Raises ModelNotFound, and InvalidInput for a selector that no model suits.

        The model of a selector is preliminary until the call is sent.
        """
        self._services, self._road, self._asked = services, road, asked
        self._catalog = services.catalog
        is_selector = selectors.is_selector(asked)
        #: About how many tokens the request needs, where that decides.
        self._context = choice.needed_context(document) if is_selector else 0
        try:
            chosen = choice.choose(asked, self._catalog, NOTHING_KNOWN, self._context, is_estimate=True)
        except NotFound:
            raise ModelNotFound("model", asked, self._catalog.names) from None
        self._is_open = is_selector
        self.model: Model = chosen.model
        self.reason = chosen.reason
        self._labels, self._is_outlined = caller.labels({}), caller.namespace is not None
        #: What a split made of it, as labels.
        self._assigned: Mapping[str, str] = {}
        run_id, body = ids.new_id(), document
        divided = None if is_selector else self._divided(run_id, document)
        if divided is not None:
            self.model, body, self._assigned = divided.model, divided.body, divided.assigned.labels
            if divided.assigned.candidate is not None:
                self.reason = f"split {divided.assigned.split}: {divided.assigned.variant}"
        created = int(clock.now().timestamp())
        request = DirectRequest.new(self.model.name, body, priority, self._labels, created)
        self.request = replace(request, run_id=run_id, labels=self._labelled())

    def _divided(self, run_id: UUID, document: Mapping[str, Any]) -> DividedCall | None:
        """What a split makes of it; None where none divides the calls of the model."""
        namespace = splits.namespace_of(self._labels)
        split = self._services.splits.of_call(self.model.name, namespace, self._catalog)
        if split is None:
            return None
        return splits.divide(split, document, self.model, namespace, run_id, self._catalog)

    @property
    def headers(self) -> dict[str, str]:
        """The headers that tell which model answers, and why."""
        reason = {REASON_HEADER: _in_header(self.reason)} if self.reason else {}
        return {MODEL_HEADER: self.model.name, **reason}

    async def entries(self) -> AsyncGenerator[StreamEntry | Waiting]:
        """
        Send the request to one model after the other until one answers, and yield what comes.

        Raises NoModelAvailable, and what the road raises.
        """
        await self.decide()
        if not self._catalog.is_rerouted(self.model.name):
            async with aclosing(self._road.send(self.request, self.model)) as entries:
                async for entry in entries:
                    yield entry
            return
        plan = choice.plan(self.model, self._catalog, await self._fleet())
        has_waited = False
        failures: list[str] = [one.reason for one in plan.passed_over]
        for number, model in enumerate(plan.tried):
            if model is not self.model:
                self._turn_to(model, failures[-1] if failures else "", is_new=number > 0)
            if number and has_waited:  # otherwise the headers tell it, and a failure still gets its status
                yield Waiting(f"falling back to {model.name}: {_in_header(failures[-1])}")
            is_last = number == len(plan.tried) - 1
            failure = None
            async with aclosing(self._try(model, is_last=is_last)) as tried:
                async for found in tried:
                    if isinstance(found, str):
                        failure = found
                        break
                    has_waited = has_waited or isinstance(found, Waiting)
                    yield _with_story(found, failures) if is_last else found
            if failure is None:
                return
            failures.append(failure)
            _log.warning("model_fell_back", asked=self._asked, model=model.name, reason=failure)

    async def decide(self) -> None:
        """Decide the model of a selector. Raises NoModelAvailable."""
        if not self._is_open:
            return
        chosen = choice.choose(self._asked, self._catalog, await self._fleet(), self._context, is_estimate=True)
        self._is_open = False
        if chosen.model is not self.model or chosen.reason != self.reason:
            self.reason = chosen.reason
            self._turn_to(chosen.model, "", is_new=False)

    async def _fleet(self) -> FleetAvailability:
        found = await self._known()
        return found.outlined() if self._is_outlined else found

    async def _known(self) -> FleetAvailability:
        reader = self._road.fleet
        if reader.latest is not None and reader.is_fresh(self._catalog):
            return reader.latest
        try:
            return await threads.run_for_stream(reader.current, self._catalog)
        except DatabaseUnreachable as error:
            _log.warning("fleet_not_read", error=str(error))
            return reader.latest or NOTHING_KNOWN

    async def _try(self, model: Model, *, is_last: bool) -> AsyncGenerator[StreamEntry | Waiting | str]:
        """The entries of one try; or, before any text, why the next model is tried: a text, which is the last."""
        limit = None if is_last or model.fallback.max_wait is None else model.fallback.max_wait.total_seconds()
        late = asyncio.get_running_loop().time() + limit if limit is not None else None
        has_text = False
        async with aclosing(self._road.send(self.request, model)) as entries:
            while True:
                try:
                    async with asyncio.timeout_at(None if has_text else late):
                        entry = await anext(entries, None)
                except TimeoutError:
                    yield f"{model.name} had no token within {limit:g} s"
                    return
                if entry is None:
                    return
                if isinstance(entry, StreamEntry):
                    failed = entry.kind is EntryKind.FAILED and not has_text and not is_last
                    if failed and choice.goes_on(model, (said := entry.json())["reason"]):
                        yield f"{model.name} failed ({said['reason']}): {said['message']}"
                        return
                    has_text = has_text or entry.is_text
                yield entry

    def _turn_to(self, model: Model, because: str, *, is_new: bool) -> None:
        """Make the request one to another model: of a new run, when the one before was sent."""
        before = self.request
        if because:
            self.reason = f"fallback: {because}"
            self._assigned = {}  # another model answers than that of the variant
        self.model = model
        after = {AFTER: str(before.run_id)} if is_new else {}
        request = DirectRequest.new(model.name, before.body, before.priority, {}, before.created)
        run_id = request.run_id if is_new else before.run_id
        self.request = replace(request, run_id=run_id, labels=self._labelled() | after)

    def _labelled(self) -> dict[str, str]:
        labels = {**self._labels, **self._assigned}
        if not self.reason:
            return labels
        return {**labels, ASKED: self._asked[:_REASON], REASON: _in_header(self.reason)}


def _with_story(entry: StreamEntry | Waiting, failures: list[str]) -> StreamEntry | Waiting:
    """A failure of the last model tells of those before it, too."""
    if not failures or isinstance(entry, Waiting) or entry.kind is not EntryKind.FAILED:
        return entry
    said = entry.json()
    message = f"{said['message']} (before it: {'; '.join(failures)})"
    return replace(entry, value=json.dumps({**said, "reason": FailureReason(said["reason"]), "message": message}))


def _in_header(text: str) -> str:
    """A text as headers and labels can have it: printable ASCII on one line."""
    plain = "".join(character if " " <= character <= "~" else " " for character in text)
    return " ".join(plain.split())[:_REASON]

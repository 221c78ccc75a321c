"""
The hooks of one attempt: an engine that calls them around each request for text.

All roads to a model pass here: steps, turns of agents, lines of batches, summaries and direct requests. A request is
given to the engine only after every hook at `pre_prompt` has let it pass; a result is seen by nobody before every hook
at `post_result` has. Pieces of a stream are held back while a hook may still change the text; `pii` alone restores them
as they come.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

from app.inference.hooks import combination, exchange, selection, shipped
from app.inference.hooks.exchange import HookAnswer, HookMisbehaved, HookText
from app.inference.hooks.selection import HookTarget
from app.inference.hooks.shipped.pii import StreamRestorer
from app.inference.hooks.shipped.scanning import HookLate, TimeLimit
from app.inference.requests import (
    Embedded,
    EmbedRequest,
    FinishReason,
    Generated,
    GenerateRequest,
    Reranked,
    RerankRequest,
    TextPiece,
)
from app.json_schema import conforms
from app.kernel import log
from app.kernel.errors import FailureReason, StepFailure
from app.kernel.sections.hooks import HookDefinition, HookPoint
from app.kernel.sections.http import HttpSettings
from app.kernel.security.secrets import Secrets
from app.workflows.state_machine.outcomes import Failure, Outcome, Success
from workers.engine import Engine, OnPiece, OnStop, OnText, Ticket, pieces_to
from workers.hooks import http_hooks
from workers.hooks.figures import HookFigures
from workers.hooks.processes import HookBroken, HookProcesses, HookStopped, HookTimeout, StopSwitch
from workers.hooks.remote_answers import RemoteAnswers

_log = log.get(__name__)

_Outcome = TypeVar("_Outcome", bound=Outcome)

#: Most calls of hooks that are recorded with an attempt.
_MOST_RECORDED = 100


@dataclass(frozen=True, slots=True)
class HookContext:
    """What hooks need of their process."""

    secrets: Secrets
    processes: HookProcesses
    figures: HookFigures
    #: Asks servers for hooks that combine; None where there is no catalogue.
    remotes: RemoteAnswers | None = None


@dataclass(slots=True)
class HookSession:
    """The hooks of one attempt, and what they did."""

    context: HookContext
    http: HttpSettings
    target: HookTarget
    hooks: tuple[HookDefinition, ...]
    #: What is recorded, as JSON.
    records: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(
        cls, context: HookContext, hooks: Sequence[HookDefinition], http: HttpSettings, target: HookTarget
    ) -> HookSession:
        """The session of an attempt."""
        return cls(context, http, target, selection.selected(hooks, target) if hooks else ())

    def around(self, engine: Engine, on_stop: OnStop) -> Engine:
        """The engine with the hooks around it; itself where there are none. `on_stop` is set while hooks run."""
        return HookedEngine(engine, self, on_stop) if self.hooks else engine

    def noted(self, outcome: _Outcome) -> _Outcome:
        """The outcome with what the hooks did."""
        if not self.records or not isinstance(outcome, Success | Failure):
            return outcome
        return replace(outcome, usage=replace(outcome.usage, hooks=tuple(self.records)))

    def call(
        self, hook: HookDefinition, point: HookPoint, texts: list[HookText], state: Any, stop: StopSwitch
    ) -> HookAnswer:
        """
        Call a hook, and record what it did.

        Raises StepFailure when the hook refuses, or fails and its policy is `closed`; CancelledError.
        """
        return self._called(hook, point, lambda: self._answer(hook, point, texts, state, stop), stop)

    def _called(
        self, hook: HookDefinition, point: HookPoint, answered: Callable[[], HookAnswer], stop: StopSwitch
    ) -> HookAnswer:
        """Return the answer of a call, which is recorded. Raises as `call`."""
        began = time.monotonic()
        result, answer, problem = "passed", HookAnswer(), ""
        try:
            answer = answered()
            result = _result_of(answer)
        except (HookStopped, CancelledError):
            raise CancelledError from None
        except (HookLate, HookTimeout):
            result, problem = "timeout", f"it did not answer within {hook.timeout.total_seconds():g} s"
        except HookMisbehaved as error:
            result, problem = "invalid", str(error)
        except HookBroken as error:
            result, problem = "failed", str(error)
        except Exception as error:  # noqa: BLE001 a defect of a hook is the hook's failure, with its policy
            _log.exception("hook_crashed", hook=hook.name)
            result, problem = "failed", f"it raised {type(error).__name__}"
        if stop.stopped:
            raise CancelledError
        seconds = time.monotonic() - began
        self.context.figures.count(hook.name, point, result, seconds)
        self._record(hook, point, result, seconds, answer.annotations, problem)
        if problem:
            _log.warning("hook_failed", hook=hook.name, at=point, result=result, error=problem, policy=hook.on_failure)
            if hook.on_failure == "open":
                return HookAnswer()
            raise StepFailure(FailureReason.HOOK_FAILED, f"the hook {hook.name} failed: {problem}")
        if answer.refuse is not None:
            raise StepFailure(FailureReason.HOOK_REFUSED, f"refused by the hook {hook.name}: {answer.refuse}")
        return answer

    def combined(self, hook: HookDefinition, request: GenerateRequest, local: Generated, stop: StopSwitch) -> Generated:
        """
        Return the local answer, or that of a server where the options of the hook prefer it.

        Raises StepFailure when the server fails and the policy is `closed`; CancelledError.
        """
        found: dict[str, Generated] = {}

        def answered() -> HookAnswer:
            answer, other = self._combined(hook, request, local, stop)
            if other is not None:
                found["remote"] = other
            return answer

        self._called(hook, HookPoint.POST_RESULT, answered, stop)
        other = found.get("remote")
        if other is None:
            return local
        return replace(local, text=other.text, finish=other.finish, logprobs=(), reasoning=other.reasoning)

    def _combined(
        self, hook: HookDefinition, request: GenerateRequest, local: Generated, stop: StopSwitch
    ) -> tuple[HookAnswer, Generated | None]:
        """What is recorded, and the answer of the server if it is used."""
        options = shipped.options_of(hook)
        assert isinstance(options, combination.CombineOptions), "its kind has these options"
        left = combination.why_not(request)
        why = None if left is not None else combination.why(options, request, local)
        if why is None:
            return HookAnswer(annotations={"asked": False, **({"left_alone": left} if left else {})}), None
        if self.context.remotes is None:
            raise HookBroken("there is no catalogue here")
        model = self.context.remotes.model(options.model)
        seconds = hook.timeout.total_seconds()
        asked = replace(request, max_tokens=options.max_tokens or request.max_tokens, prefill="")
        began = time.monotonic()
        remote = self.context.remotes.ask(model, asked, seconds, stop)
        used = combination.uses_remote(options, request, local, remote)
        annotations: dict[str, str | int | float | bool] = {
            "asked": True,
            "why": why,
            "model": model.name,
            "used": "remote" if used else "local",
            "tokens_in": remote.tokens_in,
            "tokens_out": remote.tokens_out,
            "seconds": round(time.monotonic() - began, 3),
        }
        texts = exchange.of_result(remote) if used else None
        return HookAnswer(texts=texts, annotations=annotations), remote if used else None

    def failed(self, hook: HookDefinition, point: HookPoint, error: HookMisbehaved) -> None:
        """An answer could not be used. Raises StepFailure, unless the policy of the hook is `open`."""
        self.context.figures.count(hook.name, point, "invalid", 0.0)
        self._record(hook, point, "invalid", 0.0, {}, str(error))
        _log.warning("hook_failed", hook=hook.name, at=point, result="invalid", error=str(error))
        if hook.on_failure == "closed":
            raise StepFailure(FailureReason.HOOK_FAILED, f"the hook {hook.name} failed: {error}")

    def _answer(
        self, hook: HookDefinition, point: HookPoint, texts: list[HookText], state: Any, stop: StopSwitch
    ) -> HookAnswer:
        seconds = hook.timeout.total_seconds()
        if hook.is_shipped:
            limit = TimeLimit(time.monotonic, time.monotonic() + seconds)
            return shipped.call(hook, point, texts, state, limit)
        document = {
            "hook": hook.name,
            "at": str(point),
            "model": self.target.model,
            "workflow": self.target.workflow,
            "namespace": self.target.namespace,
            "options": dict(hook.options),
            "texts": [one.model_dump() for one in texts],
            "state": state,
        }
        if hook.kind == "python":
            assert hook.entry_point is not None, "settings require it"
            found = self.context.processes.call(hook.entry_point, document, seconds, stop)
        else:
            found = http_hooks.call(hook, document, self.context.secrets, self.http, stop)
        return exchange.answer_of(found)

    def _record(
        self,
        hook: HookDefinition,
        point: HookPoint,
        result: str,
        seconds: float,
        annotations: Mapping[str, Any],
        problem: str,
    ) -> None:
        if len(self.records) < _MOST_RECORDED:
            of = {"hook": hook.name, "at": str(point), "result": result, "ms": round(seconds * 1000, 1)}
            more = ({"annotations": dict(annotations)} if annotations else {}) | ({"error": problem} if problem else {})
            self.records.append(of | more)


class HookedEngine:
    """An engine whose requests for text pass the hooks of a session. Other requests go to the engine as they are."""

    def __init__(self, engine: Engine, session: HookSession, on_stop: OnStop) -> None:
        self._engine, self._session, self._on_stop = engine, session, on_stop
        self.slots = engine.slots

    @property
    def window(self) -> int:
        """See the protocol."""
        return self._engine.window

    @property
    def reads_images(self) -> bool:
        """See the protocol."""
        return self._engine.reads_images

    @property
    def counts_exactly(self) -> bool:
        """See the protocol."""
        return self._engine.counts_exactly

    @property
    def calls_tools(self) -> bool:
        """See the protocol."""
        return self._engine.calls_tools

    def count(self, request: GenerateRequest) -> int:
        """See the protocol."""
        return self._engine.count(request)

    def count_texts(self, texts: Sequence[str]) -> list[int]:
        """See the protocol."""
        return self._engine.count_texts(texts)

    def generate(
        self, request: GenerateRequest, on_text: OnText | None = None, on_piece: OnPiece | None = None
    ) -> Ticket:
        """See the protocol. Waits for the hooks at `pre_prompt`. Raises CancelledError when it was stopped then."""
        stop = StopSwitch()
        self._on_stop(stop.stop)
        states: dict[str, Any] = {}
        session = self._session
        for hook in selection.at(session.hooks, HookPoint.PRE_PROMPT):
            answer = session.call(hook, HookPoint.PRE_PROMPT, exchange.of_request(request), None, stop)
            if answer.state is not None:
                states[hook.name] = answer.state
            if answer.texts is not None:
                try:
                    request = exchange.with_request(request, answer.texts)
                except HookMisbehaved as error:
                    session.failed(hook, HookPoint.PRE_PROMPT, error)
        later = selection.at(session.hooks, HookPoint.POST_RESULT)
        reader = _reader(pieces_to(on_text, on_piece), later, states, request)
        return HookedTicket(self._engine.generate(request, on_piece=reader), session, later, states, request, stop)

    def embed(self, request: EmbedRequest, timeout: float | None = None, on_stop: OnStop | None = None) -> Embedded:
        """See the protocol."""
        return self._engine.embed(request, timeout, on_stop)

    def rerank(self, request: RerankRequest, timeout: float | None = None, on_stop: OnStop | None = None) -> Reranked:
        """See the protocol."""
        return self._engine.rerank(request, timeout, on_stop)

    def stalled_for(self) -> timedelta:
        """See the protocol."""
        return self._engine.stalled_for()

    def close(self) -> None:
        """See the protocol."""
        self._engine.close()


class HookedTicket:
    """A ticket whose result passes the hooks at `post_result`, on the thread that waits for it."""

    def __init__(
        self,
        ticket: Ticket,
        session: HookSession,
        hooks: Sequence[HookDefinition],
        states: Mapping[str, Any],
        request: GenerateRequest,
        stop: StopSwitch,
    ) -> None:
        self._ticket, self._session, self._hooks, self._states = ticket, session, hooks, states
        self._request, self._stop = request, stop
        self._lock = threading.Lock()
        self._passed: Generated | None = None

    def result(self, timeout: float | None = None) -> Generated:
        """See the protocol. The time limit is that of the engine; each hook has its own."""
        generated = self._ticket.result(timeout)
        with self._lock:
            if self._passed is None:
                self._passed = self._through(generated)
            return self._passed

    def written(self) -> int:
        """See the protocol."""
        return self._ticket.written()

    def cancel(self) -> None:
        """See the protocol."""
        self._ticket.cancel()
        self._stop.stop()

    def when_done(self, action: Callable[[], None]) -> None:
        """Call `action` when the engine is done: `result` then waits for the hooks only."""
        self._ticket.when_done(action)

    def _through(self, generated: Generated) -> Generated:
        for hook in self._hooks:
            if hook.kind == "combine":
                generated = self._session.combined(hook, self._request, generated, self._stop)
                continue
            texts = exchange.of_result(generated)
            answer = self._session.call(hook, HookPoint.POST_RESULT, texts, self._states.get(hook.name), self._stop)
            if answer.texts is None:
                continue
            try:
                generated = self._changed(hook, generated, answer.texts)
            except HookMisbehaved as error:
                self._session.failed(hook, HookPoint.POST_RESULT, error)
        return generated

    def _changed(self, hook: HookDefinition, generated: Generated, texts: Sequence[HookText]) -> Generated:
        """Raises HookMisbehaved."""
        if not hook.changes:
            raise HookMisbehaved("it changes the result, and has `changes = false`")
        after = exchange.with_result(generated, texts)
        _require_conformity(after, generated, self._request)
        return after


def _require_conformity(after: Generated, before: Generated, request: GenerateRequest) -> None:
    """Raises HookMisbehaved when a changed text or argument does not conform to its schema any more."""
    tools = {tool.name: tool.parameters for tool in request.tools}
    pairs = zip((after, *after.alternatives), (before, *before.alternatives), strict=True)
    for new, old in pairs:
        if request.schema is not None and new.text != old.text and new.finish is FinishReason.STOP:
            try:
                value = json.loads(new.text)
            except (ValueError, RecursionError):
                raise HookMisbehaved("the text that it answers is no JSON, as the request demands") from None
            if not conforms(request.schema, value):
                raise HookMisbehaved("the text that it answers does not conform to the schema of the request")
        for call, was in zip(new.tool_calls, old.tool_calls, strict=True):
            if call != was and call.name in tools and not conforms(tools[call.name], dict(call.arguments)):
                raise HookMisbehaved(f"the arguments of {call.name} that it answers do not conform to their schema")


def _reader(
    on_piece: OnPiece | None, hooks: Sequence[HookDefinition], states: Mapping[str, Any], request: GenerateRequest
) -> OnPiece | None:
    """The reader of pieces: live, restoring, or None while a hook may change or refuse the text."""
    changing = [hook for hook in hooks if hook.changes and _may_change(hook, states)]
    if on_piece is None or not changing:
        return on_piece
    if [hook.kind for hook in changing] != ["pii"] or request.tools or request.logprobs is not None:
        return None
    values = dict(states[changing[0].name])
    restorers: dict[int, StreamRestorer] = {}

    def restored(piece: TextPiece) -> None:
        shown = restorers.setdefault(piece.index, StreamRestorer(values)).feed(piece.text)
        if shown:
            on_piece(replace(piece, text=shown))

    return restored


def _may_change(hook: HookDefinition, states: Mapping[str, Any]) -> bool:
    """Whether a hook may change or refuse a result."""
    match hook.kind:
        case "pii":
            return bool(states.get(hook.name))
        case "language":
            return bool(hook.options.get("allowed"))
        case "injection":
            return bool(
                hook.options.get("action", "annotate") != "annotate" and "assistant" in hook.options.get("roles", ())
            )
        case "secrets" | "words":
            return bool(hook.options.get("action", "mask") != "annotate")
        case _:
            return True


def _result_of(answer: HookAnswer) -> str:
    if answer.refuse is not None:
        return "refused"
    if answer.texts is not None:
        return "changed"
    return "annotated" if answer.annotations else "passed"

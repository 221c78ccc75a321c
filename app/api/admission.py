"""
Admission: limits on calls of models and on submissions of runs, and the headers that tell clients of them.

A call is held from its admission to its end, and is charged with the tokens of its answer then; a call that its client
stops, with those that were written. What follows an answer happens in the background.
Without Redis no call is answered anyway, so it is refused with 503; a submission is stored without Redis, so it is
accepted (app/decisions.md, 71).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TypeVar

import redis
from redis.asyncio import Redis

from app.access.callers import Caller
from app.access.limits.limits import (
    CallLimits,
    LimitName,
    LimitReached,
    LimitStanding,
    LimitSubject,
    SubjectKind,
    tightest,
)
from app.access.limits.meter import RENEWAL, MeteredCall, ScriptCall, renewal
from app.access.limits.store import CallLimitTable
from app.api.services import Services
from app.inference.direct import DirectRequest
from app.inference.token_stream import EntryKind, StreamEntry
from app.kernel import ids, log
from app.kernel.errors import BrokerUnreachable, Unavailable

_log = log.get(__name__)

E = TypeVar("E")
#: What waits for a minute, in the policies of the IETF's draft.
_WINDOW = 60
#: Seconds after which a client tries again what was shed.
_SHED_RETRY = 30


class CallGate:
    """Admits the calls of models of this process, and renews the leases of those that are being answered."""

    def __init__(self, client: Redis, table: CallLimitTable) -> None:
        self._redis, self._table = client, table
        self._held: set[CallAdmission] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._renewing: asyncio.Task[None] | None = None
        self._closed = False

    async def admit(self, caller: Caller, id_: str, priority: str) -> CallAdmission:
        """
        Admit a call, which is held until `release`. `id_` is unique, `priority` its class.

        Raises LimitReached, BrokerUnreachable.
        """
        limits = limits_of(self._table, caller, caller.namespace_of({}))
        call = MeteredCall.of(id_, limits, priority, is_held=True)
        admission = CallAdmission(self, call)
        if call.checks:
            try:
                answer = await self._redis.eval(*call.admission())
            except redis.ResponseError as error:
                _log.warning("call_not_counted", error=str(error))  # a key of a wrong type blocks nobody
                return CallAdmission(self, MeteredCall(id_, ()))
            except (redis.RedisError, OSError) as error:
                raise BrokerUnreachable(f"the broker is unreachable: {error}") from error
            admission.standings = call.standings(answer)
            if admission.held():
                self._held.add(admission)
                self._renew()
        return admission

    async def metered(
        self, caller: Caller, request: DirectRequest, entries: AsyncGenerator[E], admitted: list[CallAdmission]
    ) -> AsyncGenerator[E]:
        """
        Admit a call, and yield its entries. `admitted` receives the admission, for the headers.

        Raises LimitReached, BrokerUnreachable, and what the entries raise.
        """
        async with aclosing(entries):
            admission = await self.admit(caller, str(request.run_id), request.priority)
            admitted.append(admission)
            try:
                async for entry in entries:
                    if isinstance(entry, StreamEntry):
                        admission.note(entry)
                    yield entry
            finally:
                admission.release()

    async def close(self) -> None:
        """Wait for what runs in the background, and stop the renewal. Leases of calls that still end run out."""
        self._closed = True
        if self._renewing is not None:
            self._renewing.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=2)

    def send(self, *, remove: Mapping[str, str], charge: ScriptCall | None) -> None:
        """Remove calls from the keys that hold them, and charge tokens, in the background."""
        if self._closed:
            return
        task = asyncio.create_task(self._send(remove, charge))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def forget(self, admission: CallAdmission) -> None:
        """Stop renewing the lease of a call."""
        self._held.discard(admission)

    async def _send(self, remove: Mapping[str, str], charge: ScriptCall | None) -> None:
        try:
            async with self._redis.pipeline(transaction=False) as pipeline:
                for key, id_ in remove.items():
                    pipeline.zrem(key, id_)
                if charge is not None:
                    pipeline.eval(*charge)
                await pipeline.execute(raise_on_error=False)
        except (redis.RedisError, OSError) as error:
            _log.warning("call_not_counted", error=str(error))

    def _renew(self) -> None:
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew_all())

    async def _renew_all(self) -> None:
        """Renew the leases while calls are held."""
        while self._held:
            await asyncio.sleep(RENEWAL.total_seconds())
            held = [(key, one.id) for one in self._held for key in one.held()]
            if held:
                try:
                    await self._redis.eval(*renewal(held))
                except (redis.RedisError, OSError) as error:
                    _log.warning("call_leases_not_renewed", error=str(error))


class CallAdmission:
    """A call that was admitted."""

    def __init__(self, gate: CallGate, call: MeteredCall) -> None:
        self._gate, self._call = gate, call
        self.id = call.id
        #: The limits that hold for it.
        self.standings: tuple[LimitStanding, ...] = ()
        self._waits, self._charged, self._written = True, False, 0

    def held(self) -> list[str]:
        """Return the keys under which it is held."""
        names = (LimitName.CONCURRENT, LimitName.WAITING) if self._waits else (LimitName.CONCURRENT,)
        return self._call.held(*names)

    def note(self, entry: StreamEntry) -> None:
        """Note what has come: a pool has begun the call, or it is done."""
        if not self._call.checks:
            return
        if self._waits:
            waiting = self._call.held(LimitName.WAITING)
            self._waits = False
            if waiting:
                self._gate.send(remove=dict.fromkeys(waiting, self.id), charge=None)
        if entry.is_text:
            self._written += 1
        elif entry.kind is EntryKind.DONE and self._call.charge(1) is not None:
            self.charge(tokens_of(entry.json()))

    def charge(self, tokens: int) -> None:
        """Charge the tokens of the answer."""
        charge = self._call.charge(tokens)
        if charge is not None and not self._charged:
            self._charged = True
            self._gate.send(remove={}, charge=charge)

    def release(self) -> None:
        """The call has ended. One that was stopped is charged with the tokens that were written."""
        if not self._call.checks:
            return
        self.charge(self._written)
        self._gate.forget(self)
        if held := self.held():
            self._gate.send(remove=dict.fromkeys(held, self.id), charge=None)


def tokens_of(document: object) -> int:
    """Return the tokens of an answer in OpenAI's form."""
    usage = document.get("usage") if isinstance(document, dict) else None
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if isinstance(total, int) else 0


def limits_of(table: CallLimitTable, caller: Caller, namespace: str) -> list[tuple[LimitSubject, CallLimits]]:
    """Return what holds for a caller in a namespace."""
    subjects = [LimitSubject(SubjectKind.NAMESPACE, namespace)]
    if caller.key_id is not None:
        subjects.append(LimitSubject(SubjectKind.KEY, caller.key_id))
    return [(subject, limits) for subject in subjects if not (limits := table.of(subject)).is_unlimited]


class LoadShed(Unavailable):
    """New work of a class is refused for a while, because a rule or an operator wants less load."""

    def __init__(self, priority: str) -> None:
        #: Seconds after which another try makes sense.
        self.retry_after = _SHED_RETRY
        super().__init__(f"new work of the class {priority!r} is refused for now (the setting serving.shed)")


def refuse_shed(services: Services, priority: str) -> None:
    """Raises LoadShed while new work of a class is refused."""
    if priority in services.settings.serving.shed:
        raise LoadShed(priority)


def admit_submission(services: Services, caller: Caller, namespace: str) -> dict[str, str]:
    """
    Count the submission of a run, on a thread; without the broker, it is accepted. Returns headers of the answer.

    Raises LimitReached.
    """
    limits = limits_of(services.call_limits, caller, namespace)
    call = MeteredCall.of(str(ids.new_id()), limits, "", is_held=False)
    if not call.checks:
        return {}
    try:
        with services.publisher.connection() as client:
            answer = client.eval(*call.admission())
        return policy_headers(call.standings(answer))
    except BrokerUnreachable as error:
        _log.warning("submission_not_counted", error=str(error))
        return {}


def openai_headers(standings: tuple[LimitStanding, ...]) -> dict[str, str]:
    """Return the headers with which OpenAI's API tells of its limits."""
    found: dict[str, str] = {}
    for name in (LimitName.REQUESTS, LimitName.TOKENS):
        if (one := tightest(standings, name)) is not None:
            found |= {
                f"x-ratelimit-limit-{name}": str(one.limit),
                f"x-ratelimit-remaining-{name}": str(one.remaining),
                f"x-ratelimit-reset-{name}": _duration(one.reset),
            }
    return found


def policy_headers(standings: tuple[LimitStanding, ...]) -> dict[str, str]:
    """Return the headers of the IETF's draft (draft-ietf-httpapi-ratelimit-headers, version 10)."""
    found = [one for name in (LimitName.REQUESTS, LimitName.TOKENS) if (one := tightest(standings, name)) is not None]
    if not found:
        return {}
    return {
        "RateLimit-Policy": ", ".join(f'"{one.name}";q={one.limit};w={_WINDOW}' for one in found),
        "RateLimit": ", ".join(f'"{one.name}";r={one.remaining};t={math.ceil(one.reset)}' for one in found),
    }


def refusal_headers(error: LimitReached) -> dict[str, str]:
    """Return the headers of a refusal: after how many whole seconds a request is accepted, and the limits."""
    return {"Retry-After": str(max(1, math.ceil(error.standing.retry_after)))}


def _duration(seconds: float) -> str:
    """Return a duration as OpenAI's API writes it: 120ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"

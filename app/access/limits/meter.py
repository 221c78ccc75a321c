"""
The meter of calls: counters in Redis, which all processes share.

All limits of a request are checked and counted by one script: in one round trip, and all or nothing. A refused request
uses nothing. Without limits nothing is sent.
The clock is that of Redis. Calls at a time and waiting calls are held under a lease, which the process renews: those of
a process that has died are forgotten after `LEASE`.

Redis keys, by kind and id of the subject:
    arriero:limits:<kind>:<id>:requests, :tokens    when what was used will have come back, in ms since 1970
    arriero:limits:<kind>:<id>:concurrent           calls that are being answered, by the end of their lease
    arriero:limits:<kind>:<id>:waiting-<class>      calls that no pool has begun, by the end of their lease
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from app.access.limits.limits import CallLimits, LimitName, LimitReached, LimitStanding, LimitSubject
from app.kernel.errors import BrokerUnreachable

#: The lease of a call, and the interval at which it is renewed.
LEASE, RENEWAL = timedelta(seconds=60), timedelta(seconds=20)
#: Seconds after which a request is accepted that finds no place: nobody knows when a call ends.
RETRY_FULL = 1.0
#: Most tokens that one answer can charge.
_MAX_CHARGE = 10_000_000

# For each key three arguments follow the lease and the id of the call: kind, limit, and whether it is counted.
_ADMIT = """
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
local lease, id, period = tonumber(ARGV[1]), ARGV[2], 60000
local allowed, found, writes = 1, {}, {}
for i, key in ipairs(KEYS) do
  local kind, limit = ARGV[3 * i], tonumber(ARGV[3 * i + 1])
  local counted = tonumber(ARGV[3 * i + 2])
  local remaining, reset, retry = 0, 0, 0
  if kind == 'requests' or kind == 'tokens' then
    local full = tonumber(redis.call('GET', key) or '') or 0
    local used = math.max(0, full - now) * limit / period
    local need = used + counted - limit
    if kind == 'tokens' and used >= limit then need = used - limit + 1 end
    if need > 0.000001 and (kind == 'requests' or used >= limit) then
      allowed, retry = 0, need * period / limit
    end
    remaining, reset = limit - used, math.max(0, full - now)
    writes[i] = {'b', counted, math.max(full, now) + counted * period / limit, counted * period / limit}
  else
    redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
    local held = redis.call('ZCARD', key)
    if held >= limit then allowed, retry = 0, -1 end
    remaining = limit - held
    writes[i] = {'z', 1, 0, 0}
  end
  found[i] = {remaining, reset, retry}
end
for i, key in ipairs(KEYS) do
  local kind, counted, full, more = unpack(writes[i])
  local one = found[i]
  if allowed == 1 then
    one[1], one[2] = one[1] - counted, one[2] + more
    if kind == 'z' then
      redis.call('ZADD', key, now + lease, id)
      redis.call('PEXPIRE', key, lease * 2)
    elseif counted > 0 then
      redis.call('SET', key, string.format('%.3f', full), 'PX', math.ceil(one[2]) + 1000)
    end
  end
  found[i] = {math.max(0, math.floor(one[1] + 0.000001)), math.ceil(one[2]), math.ceil(one[3])}
end
return {allowed, found}
"""
_CHARGE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
for i, key in ipairs(KEYS) do
  local full = math.max(now, tonumber(redis.call('GET', key) or '') or 0)
  full = full + tonumber(ARGV[1]) * 60000 / tonumber(ARGV[i + 1])
  redis.call('SET', key, string.format('%.3f', full), 'PX', math.ceil(full - now) + 1000)
end
"""
_RENEW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
for i, key in ipairs(KEYS) do
  redis.call('ZADD', key, 'XX', now + tonumber(ARGV[1]), ARGV[i + 1])
  redis.call('PEXPIRE', key, tonumber(ARGV[1]) * 2)
end
"""

#: The arguments of EVAL: the script, the number of keys, the keys, and what follows.
ScriptCall = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Check:
    """A limit that a request must keep."""

    subject: LimitSubject
    name: LimitName
    limit: int
    key: str
    #: What the request uses of it now.
    counted: int


@dataclass(frozen=True, slots=True)
class MeteredCall:
    """A request and all limits that hold for it."""

    id: str
    checks: tuple[_Check, ...]

    @classmethod
    def of(
        cls, id_: str, limits: Sequence[tuple[LimitSubject, CallLimits]], priority: str, *, is_held: bool
    ) -> MeteredCall:
        """
        Return the request `id_` with what it must keep.

        A held request is a call, which is being answered for a while; others only count as requests.
        """
        checks: list[_Check] = []
        waiting = "batch" if priority == "batch" else "interactive"
        for subject, limit in limits:
            every = [
                (LimitName.REQUESTS, limit.requests_per_minute, "requests", 1),
                (LimitName.TOKENS, limit.tokens_per_minute, "tokens", 0),
            ]
            if is_held:
                of_class = limit.waiting_batch if waiting == "batch" else limit.waiting_interactive
                every += [
                    (LimitName.CONCURRENT, limit.concurrent_calls, "concurrent", 1),
                    (LimitName.WAITING, of_class, f"waiting-{waiting}", 1),
                ]
            checks += [_Check(subject, name, most, _key(subject, end), n) for name, most, end, n in every if most]
        return cls(id_, tuple(checks))

    def admission(self) -> ScriptCall:
        """Return the arguments of EVAL that check and count the request."""
        arguments = [(check.name.value, str(check.limit), str(check.counted)) for check in self.checks]
        flat = [text for three in arguments for text in three]
        return (_ADMIT, len(self.checks), *self._keys(), str(_milliseconds(LEASE)), self.id, *flat)

    def standings(self, answer: Any) -> tuple[LimitStanding, ...]:
        """Return what is left of each limit, from the answer of the script. Raises LimitReached."""
        try:
            allowed, found = answer
            standings = tuple(
                LimitStanding(
                    check.subject,
                    check.name,
                    check.limit,
                    int(remaining),
                    int(reset) / 1000,
                    RETRY_FULL if int(retry) < 0 else int(retry) / 1000,
                )
                for check, (remaining, reset, retry) in zip(self.checks, found, strict=True)
            )
        except (TypeError, ValueError) as error:
            raise BrokerUnreachable(f"the broker has counted nothing: {error}") from error
        if not allowed:
            raise LimitReached(standings)
        return standings

    def charge(self, tokens: int) -> ScriptCall | None:
        """Return the arguments of EVAL that charge the tokens of the answer; None when there is nothing to charge."""
        limited = [check for check in self.checks if check.name is LimitName.TOKENS]
        if not limited or tokens <= 0:
            return None
        limits = [str(check.limit) for check in limited]
        return (_CHARGE, len(limited), *(check.key for check in limited), str(min(tokens, _MAX_CHARGE)), *limits)

    def held(self, *names: LimitName) -> list[str]:
        """Return the keys under which the call is held."""
        return [check.key for check in self.checks if check.name in names]

    def _keys(self) -> list[str]:
        return [check.key for check in self.checks]


def renewal(held: Sequence[tuple[str, str]]) -> ScriptCall:
    """Return the arguments of EVAL that renew the leases of calls: keys with ids."""
    keys, ids = [key for key, _ in held], [id_ for _, id_ in held]
    return (_RENEW, len(held), *keys, str(_milliseconds(LEASE)), *ids)


def _key(subject: LimitSubject, name: str) -> str:
    return f"arriero:limits:{subject.kind}:{subject.id}:{name}"


def _milliseconds(duration: timedelta) -> int:
    return round(duration.total_seconds() * 1000)

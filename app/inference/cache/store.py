"""
The store of the response cache: cached answers, and who computes which one now, in Redis.

Each change is one script, so that of all processes exactly one computes an answer, and all bytes are counted.
A computation is held by a lease: when its process dies, another one computes.

Redis keys:
    arriero:cache:entry:<digest>      string: when it was computed (milliseconds, 13 digits) and the answer
    arriero:cache:flight:<flight>     string: `<process>:<run>` that computes `<digest>:<class>`; a lease
    arriero:cache:followed:<flight>   string: present while calls of another process wait for it
    arriero:cache:index               sorted set: `<namespace>|<model>|<digest>` by the time at which the entry expires
    arriero:cache:sizes               hash: the bytes of each member of the index, and of all together (`total`)
    arriero:cache:counts              hash: calls by `<namespace>|<model>|<status>`
    arriero:cache:near:<group>        list: digests of a group of chats with the vectors of their last messages
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from redis.asyncio import Redis

from app.inference.cache.key import CacheKey
from app.inference.cache.policy import CachePolicy, CacheStatus

#: A computation without a renewal for this long is over; how often it is renewed.
LEASE, RENEWED_EACH = timedelta(seconds=6), timedelta(seconds=2)
#: Members of the index that are read at once.
_PAGE = 500

_INDEX, _SIZES, COUNTS = "arriero:cache:index", "arriero:cache:sizes", "arriero:cache:counts"

# KEYS: entry, flight, followed, counts. ARGV: reads, most milliseconds of age or -1, process, run, lease, owner.
_JOIN = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local process = ARGV[3]
local function count(status) redis.call('HINCRBY', KEYS[4], ARGV[6] .. '|' .. status, 1) end
if ARGV[1] == '1' then
  local found = redis.call('GET', KEYS[1])
  if found then
    local age = now - tonumber(string.sub(found, 1, 13))
    if tonumber(ARGV[2]) < 0 or age <= tonumber(ARGV[2]) then
      count('hit')
      return {'hit', tostring(age), string.sub(found, 14)}
    end
  end
end
local flight = redis.call('GET', KEYS[2])
if flight then
  if string.sub(flight, 1, #process) ~= process then redis.call('SET', KEYS[3], '1', 'PX', ARGV[5]) end
  count('shared')
  return {'shared', flight, ''}
end
redis.call('SET', KEYS[2], process .. ':' .. ARGV[4], 'PX', ARGV[5])
count('miss')
return {'miss', '0', ''}
"""
# KEYS: flight, followed. ARGV: process:run. 1 when nobody else waits for the computation, which is then given up.
_LEAVE = """
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return 1
"""
# KEYS: entry, flight, index, sizes. ARGV: answer or '', process:run, member, milliseconds to live, most bytes, prefix.
_END = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local function forget(member)
  local size = tonumber(redis.call('HGET', KEYS[4], member) or '0')
  redis.call('HDEL', KEYS[4], member)
  redis.call('ZREM', KEYS[3], member)
  redis.call('HINCRBY', KEYS[4], 'total', -size)
end
if #ARGV[1] > 0 then
  forget(ARGV[3])
  redis.call('SET', KEYS[1], string.format('%013.0f', now) .. ARGV[1], 'PX', ARGV[4])
  redis.call('ZADD', KEYS[3], now + tonumber(ARGV[4]), ARGV[3])
  redis.call('HSET', KEYS[4], ARGV[3], #ARGV[1])
  redis.call('HINCRBY', KEYS[4], 'total', #ARGV[1])
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now, 'LIMIT', 0, 100)) do forget(member) end
  while tonumber(redis.call('HGET', KEYS[4], 'total') or '0') > tonumber(ARGV[5]) do
    local oldest = redis.call('ZRANGE', KEYS[3], 0, 0)[1]
    if not oldest then redis.call('HSET', KEYS[4], 'total', 0) break end
    redis.call('DEL', ARGV[6] .. string.match(oldest, '[^|]*$'))
    forget(oldest)
  end
end
if redis.call('GET', KEYS[2]) == ARGV[2] then redis.call('DEL', KEYS[2]) end
return 1
"""
# KEYS: index, sizes. ARGV: prefix, members.
_REMOVE = """
local removed = 0
for i = 2, #ARGV do
  local member = ARGV[i]
  local size = tonumber(redis.call('HGET', KEYS[2], member) or '0')
  removed = removed + redis.call('DEL', ARGV[1] .. string.match(member, '[^|]*$'))
  redis.call('HDEL', KEYS[2], member)
  redis.call('ZREM', KEYS[1], member)
  redis.call('HINCRBY', KEYS[2], 'total', -size)
end
return removed
"""


def _entry(digest: str) -> str:
    return f"arriero:cache:entry:{digest}"


def _flight(flight: str) -> str:
    return f"arriero:cache:flight:{flight}"


def _followed(flight: str) -> str:
    return f"arriero:cache:followed:{flight}"


@dataclass(frozen=True, slots=True)
class Joined:
    """What a call found: an answer, a computation, or neither, and then it computes."""

    status: CacheStatus
    #: Seconds since the answer was computed.
    age: float = 0.0
    answer: bytes = b""
    #: The run that computes it, and whether it is one of this process.
    run_id: str = ""


@dataclass(slots=True)
class OwnerCounts:
    """The cached answers of a model in a namespace, and its calls by status."""

    namespace: str
    model: str
    entries: int = 0
    bytes: int = 0
    calls: dict[str, int] = field(default_factory=dict)


class CacheStore:
    """Cached answers, and who computes them. Every method raises redis.RedisError."""

    def __init__(self, client: Redis, process: str, ttl: timedelta, max_entry_bytes: int, max_bytes: int) -> None:
        """`process` is the id of this process; it has no colon."""
        self._redis, self._process = client, process
        self._ttl, self._max_entry, self._max_bytes = int(ttl.total_seconds() * 1000), max_entry_bytes, max_bytes
        self._join, self._leave = client.register_script(_JOIN), client.register_script(_LEAVE)
        self._end, self._remove = client.register_script(_END), client.register_script(_REMOVE)

    async def join(self, key: CacheKey, run_id: str, policy: CachePolicy) -> Joined:
        """Find an answer or the computation of one; without either, the caller computes it as `run_id`."""
        age = -1 if policy.max_age is None else policy.max_age * 1000
        keys = [_entry(key.digest), _flight(key.flight), _followed(key.flight), COUNTS]
        given: list[Any] = [int(policy.reads), age, self._process, run_id, _milliseconds(LEASE), key.owner]
        status, detail, answer = await self._join(keys, given)
        match CacheStatus(status.decode()):
            case CacheStatus.HIT:
                return Joined(CacheStatus.HIT, age=int(detail) / 1000, answer=answer)
            case CacheStatus.SHARED:
                return Joined(CacheStatus.SHARED, run_id=detail.decode().partition(":")[2])
            case _:
                return Joined(CacheStatus.MISS, run_id=run_id)

    async def find(self, key: CacheKey, policy: CachePolicy) -> Joined | None:
        """Find an answer; None without one."""
        found: Any = await self._redis.get(_entry(key.digest))
        if found is None:
            return None
        seconds, micros = await self._redis.time()
        age = seconds + micros / 1e6 - int(found[:13]) / 1000
        if policy.max_age is not None and age > policy.max_age:
            return None
        return Joined(CacheStatus.HIT, age=age, answer=found[13:])

    async def count(self, key: CacheKey, status: CacheStatus) -> None:
        """Count a call."""
        await self._redis.hincrby(COUNTS, f"{key.owner}|{status}", 1)

    async def leave(self, key: CacheKey, run_id: str) -> bool:
        """Give up a computation; False when calls of other processes wait for it."""
        keys = [_flight(key.flight), _followed(key.flight)]
        return bool(await self._leave(keys, [f"{self._process}:{run_id}"]))

    async def end(self, key: CacheKey, run_id: str, answer: bytes) -> None:
        """A computation has ended. Its answer is kept, unless it is empty or too long."""
        kept = answer if len(answer) <= self._max_entry else b""
        keys = [_entry(key.digest), _flight(key.flight), _INDEX, _SIZES]
        member, held = f"{key.owner}|{key.digest}", f"{self._process}:{run_id}"
        await self._end(keys, [kept, held, member, self._ttl, self._max_bytes, _entry("")])

    async def is_computed(self, key: CacheKey, run_id: str) -> bool:
        """Whether a process holds the computation of the answer in this run."""
        held: Any = await self._redis.get(_flight(key.flight))
        return held is not None and held.decode().partition(":")[2] == run_id

    async def renew(self, led: Iterable[tuple[CacheKey, str]], followed: Iterable[CacheKey]) -> None:
        """Renew the leases of computations of this process, and tell others that calls here wait for theirs."""
        lease = _milliseconds(LEASE)
        async with self._redis.pipeline(transaction=False) as pipeline:
            for key, run_id in led:
                pipeline.set(_flight(key.flight), f"{self._process}:{run_id}", px=lease)
            for key in followed:
                pipeline.set(_followed(key.flight), "1", px=lease)
            await pipeline.execute()

    async def stats(self, namespace: str | None) -> list[OwnerCounts]:
        """What is kept and was counted, by namespace and model; of one namespace only, if it is given."""
        found: dict[tuple[str, str], OwnerCounts] = {}

        def of(owner: tuple[str, str]) -> OwnerCounts:
            return found.setdefault(owner, OwnerCounts(*owner))

        seconds, _ = await self._redis.time()
        sizes: Any = await self._redis.hgetall(_SIZES)
        kept: Any = await self._redis.zrangebyscore(_INDEX, seconds * 1000, "+inf")
        for member in kept:
            counts = of(_parts(member)[0])
            counts.entries += 1
            counts.bytes += int(sizes.get(member, 0))
        counted: Any = await self._redis.hgetall(COUNTS)
        for member, calls in counted.items():
            owner, status = _parts(member)
            of(owner).calls[status] = int(calls)
        return [one for owner, one in sorted(found.items()) if namespace in (None, owner[0])]

    async def purge(self, namespace: str | None, model: str | None) -> int:
        """Remove the answers of a namespace, of a model, or of one in the other; returns how many there were."""
        removed, chosen = 0, defaultdict(list)
        async for member, _ in self._redis.zscan_iter(_INDEX, count=_PAGE):
            owner, _ = _parts(member)
            if namespace in (None, owner[0]) and model in (None, owner[1]):
                chosen[owner].append(member)
        for members in chosen.values():
            for at in range(0, len(members), _PAGE):
                removed += int(await self._remove([_INDEX, _SIZES], [_entry(""), *members[at : at + _PAGE]]))
        return removed


def _parts(member: bytes) -> tuple[tuple[str, str], str]:
    """The namespace and the model of a member or a counter, and its last part."""
    owner, _, last = member.decode("utf-8", "replace").rpartition("|")
    namespace, _, model = owner.partition("|")
    return (namespace, model), last


def _milliseconds(time: timedelta) -> int:
    return int(time.total_seconds() * 1000)

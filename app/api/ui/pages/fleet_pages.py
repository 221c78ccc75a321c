"""The page of the fleet: each device as a map of its memory, pools and why they are there, loads and evictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from fastapi import Request
from fastapi.responses import HTMLResponse

from app.access.callers import KeyScope
from app.api.callers import InjectedCaller, requires
from app.api.fleet import fleet as fleet_resource
from app.api.fleet import pools as pools_resource
from app.api.fleet.hosts import DeviceOut
from app.api.fleet.pools import PoolOut
from app.api.routers import ApiRouter
from app.api.services import InjectedServices
from app.api.ui import drawing
from app.api.ui.drawing import SPAN, Bar
from app.api.ui.rendering import render
from app.kernel import clock
from app.kernel.units import sizes

router = ApiRouter(prefix="/ui", include_in_schema=False, dependencies=[requires(KeyScope.READ, all_namespaces=True)])

#: The time that the time-line shows, and most of its rows.
_BACK, _ROWS = timedelta(hours=6), 30


@dataclass(frozen=True, slots=True)
class MapPart:
    """A part of a device's memory, to scale."""

    kind: str
    begin: float
    width: float
    #: Of it, what its processes really use.
    measured: float
    label: str
    pool: str = ""


@dataclass(frozen=True, slots=True)
class MemoryMap:
    """The memory of a device as parts from left to right."""

    device: DeviceOut
    parts: Sequence[MapPart]
    #: Of the guaranteed capacity, the bytes that are lent to others, and where they are drawn: at the end of the pools.
    lent: int
    lent_begin: float
    lent_width: float


@dataclass(frozen=True, slots=True)
class PoolTimes:
    """A pool on the time-line."""

    pool: PoolOut
    bars: Sequence[Bar]


@router.get("/fleet")
def fleet(
    request: Request, caller: InjectedCaller, services: InjectedServices, defragment: bool = False
) -> HTMLResponse:
    """Hosts with their devices, pools, loads and evictions. `defragment` shows what defragmenting would do."""
    found = fleet_resource.get(services)
    now = clock.now()
    largest = max((one.total for host in found.hosts for one in host.devices), default=1)
    ended = pools_resource.page(services, ended=True).pools
    oldest = min((one.created_at for one in ended), default=now)
    back = min(max(now - oldest, timedelta(minutes=1)), _BACK)
    return render(
        request,
        caller,
        "fleet.html",
        title="Fleet",
        fleet=found,
        pools=found.pools,
        maps={host.name: [map_of(one, found.pools, largest) for one in host.devices] for host in found.hosts},
        models=[model.name for model in services.catalog],
        times=_times(ended, now, back),
        back=back,
        recent=[pool for pool in ended if now - pool.created_at <= back][:_ROWS],
        plan=fleet_resource.preview(services) if defragment else None,
        past=fleet_resource.defragmentations(services, 5).defragmentations,
        in_words=drawing.in_words,
        span=SPAN,
    )


def map_of(device: DeviceOut, pools: Sequence[PoolOut], largest: int) -> MemoryMap:
    """
    Return the map of a device: its pools, then what is unmanaged, guaranteed, free, and kept back.

    `largest` is the size of the largest device, whose map is as wide as the page.
    """
    parts: list[MapPart] = []
    unit = SPAN / max(largest, 1)
    begin = 0

    def add(kind: str, size: int, label: str, measured: int = 0, pool: str = "") -> None:
        nonlocal begin
        if size > 0:
            text = f"{label}: {sizes.rounded(size)}"
            shown = round(min(measured, size) * unit, 2)
            parts.append(MapPart(kind, round(begin * unit, 2), round(size * unit, 2), shown, text, pool))
            begin += size

    here = sorted((one for one in pools if device.id in one.bytes), key=lambda one: one.created_at)
    for one in here:
        used = one.used.get(device.id, 0)
        measured = f", measured {sizes.rounded(used)}" if used else ""
        add(str(one.state), one.bytes[device.id], f"{one.model}, {one.state}{measured}", used, one.id)
    pooled = sum(one.bytes[device.id] for one in here)
    add("draining", device.reserved - pooled, "reserved, and not yet released")
    pools_end = begin
    add("unmanaged", device.unmanaged, "used by others, unmanaged")
    rest = max(device.capacity - begin, 0)
    guaranteed = min(device.guaranteed, rest)
    add("guaranteed", guaranteed, "guaranteed to models that are not loaded")
    add("free", rest - guaranteed, "free")
    add("margin", device.total - begin, "kept back")
    lent = min(max(device.guaranteed - guaranteed, 0), pools_end)
    return MemoryMap(device, parts, lent, round((pools_end - lent) * unit, 2), round(lent * unit, 2))


def _times(pools: Sequence[PoolOut], now: datetime, back: timedelta) -> Sequence[PoolTimes]:
    """Return when each pool loaded and served, the newest first."""
    begin = now - back

    def bar(first: datetime, last: datetime, kind: str, title: str) -> Bar:
        left = max((first - begin) / back, 0) * SPAN
        right = min((last - begin) / back, 1) * SPAN
        return Bar(round(left, 1), round(max(right - left, 2), 1), kind, title)

    rows = []
    for one in pools:
        until = one.ended_at or now
        if until < begin:
            continue
        served = one.serving_at or until
        bars = [bar(one.created_at, served, "starting", f"loaded in {drawing.in_words(served - one.created_at)}")]
        if one.serving_at:
            bars.append(bar(served, until, "failed" if one.failed else "serving", "served"))
        rows.append(PoolTimes(one, bars))
    return rows[:_ROWS]

"""
The state of the installation as metrics: queues, runs, pools, devices and hosts, read when it is created.

What cannot be read is left out, and its component is down: a scrape during an outage tells of the outage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from app import __version__
from app.api.services import Services
from app.api.telemetry import governance
from app.fleet import views
from app.fleet.views import FleetView
from app.inference import backlog, refinement_counters
from app.inference.backlog import Backlog
from app.inference.refinement_counters import RefinementCounts
from app.kernel import log
from app.kernel.broker import CONTROL_QUEUE, IO_QUEUE, model_queue
from app.kernel.errors import Unavailable

_log = log.get(__name__)

#: Most models of the catalogue whose queues are read.
_MOST_QUEUES = 1_000
#: What is measured of a device, in bytes.
_BYTES = {
    "total": "Memory of the device.",
    "capacity": "Memory that all reservations together may have.",
    "reserved": "Reserved memory.",
    "used": "Memory in use by all processes, as measured.",
    "unmanaged": "Memory in use by processes without a reservation.",
}


class ClusterMetrics(Collector):
    """The metrics of one instant."""

    def __init__(self, services: Services) -> None:
        self._up = {"database": True, "broker": True}
        self._fleet: FleetView | None = None
        self._backlog: Backlog | None = None
        self._governance: Sequence[Metric] = ()
        self._messages: Mapping[str, int] = {}
        self._letters: tuple[int, Mapping[tuple[str, str], int]] | None = None
        self._refinements: RefinementCounts = {}
        try:
            self._fleet, self._backlog = views.fleet(services.database), backlog.read(services.database)
            self._governance = governance.read(services.database)
        except Unavailable as error:
            self._note("database", error)
        slugs = [model.slug for model in services.catalog][:_MOST_QUEUES]
        try:
            self._messages = services.publisher.depths([CONTROL_QUEUE, IO_QUEUE, *map(model_queue, slugs)])
            letters = services.publisher.dead_letters()
            self._letters = letters.kept(), letters.counts()
            with services.publisher.connection() as client:
                self._refinements = refinement_counters.read(client)
        except Unavailable as error:
            self._note("broker", error)

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        yield _labelled("arriero_build_info", "1, with the version.", {(__version__,): 1}, "version")
        up = {(name,): float(value) for name, value in self._up.items()}
        yield _labelled("arriero_component_up", "1 while the component answers.", up, "component")
        if self._backlog is not None:
            yield from self._of_backlog(self._backlog)
        if self._fleet is not None:
            yield from _of_fleet(self._fleet)
        yield from self._governance
        if self._letters is not None:
            yield from self._of_broker(*self._letters)

    def _note(self, component: str, error: Unavailable) -> None:
        self._up[component] = False
        _log.warning("metrics_incomplete", component=component, error=str(error))

    def _of_backlog(self, found: Backlog) -> Iterator[Metric]:
        ready = {(one.queue,): float(one.steps) for one in found.queues}
        ages = {(one.queue,): one.age for one in found.queues}
        yield _labelled("arriero_queue_ready_steps", "Steps that wait for a worker, by queue.", ready, "queue")
        yield _labelled(
            "arriero_queue_oldest_step_age_seconds", "Time since the oldest ready step became ready.", ages, "queue"
        )
        steps = {(state,): float(count) for state, count in found.steps.items()}
        yield _labelled("arriero_steps", "Steps that run, or wait for time, events or others.", steps, "state")
        runs = {(state,): float(count) for state, count in found.runs.items()}
        yield _labelled("arriero_runs", "Runs that have not ended.", runs, "state")

    def _of_broker(self, kept: int, counts: Mapping[tuple[str, str], int]) -> Iterator[Metric]:
        messages = {(queue,): float(count) for queue, count in self._messages.items()}
        yield _labelled("arriero_queue_messages", "Messages that no worker has taken, by queue.", messages, "queue")
        yield GaugeMetricFamily("arriero_dead_letters_kept", "Dead letters that are kept.", value=kept)
        total = CounterMetricFamily(
            "arriero_dead_letters", "Messages and keys that workers could not read.", labels=("queue", "reason")
        )
        for labels, count in counts.items():
            total.add_metric(labels, count)
        yield total
        for name, (meaning, label) in refinement_counters.COUNTERS.items():
            family = CounterMetricFamily(f"arriero_refinement_{name}", meaning, labels=("kind", label))
            for kind, value, count in self._refinements.get(name, ()):
                family.add_metric((kind, value), count)
            yield family


def _of_fleet(fleet: FleetView) -> Iterator[Metric]:
    pools: dict[tuple[str, ...], float] = {}
    slots: dict[tuple[str, ...], float] = {}
    busy: dict[tuple[str, ...], float] = {}
    for pool in fleet.pools:
        key = (pool.model, pool.phase or "starting")
        pools[key] = pools.get(key, 0) + 1
        if pool.phase == "serving":
            slots[(pool.model,)] = slots.get((pool.model,), 0) + pool.slots
            busy[(pool.model,)] = busy.get((pool.model,), 0) + pool.busy
    yield _labelled("arriero_pools", "Pools, by model and phase.", pools, "model", "phase")
    yield _labelled("arriero_pool_slots", "Slots of serving pools, by model.", slots, "model")
    yield _labelled("arriero_pool_busy_slots", "Slots of serving pools that are in use, by model.", busy, "model")
    refused: dict[tuple[str, ...], float] = {}
    for one in fleet.refusals:
        refused[(one.model,)] = refused.get((one.model,), 0) + 1
    yield _labelled("arriero_refusals", "Reasons why a model with demand is not started.", refused, "model")
    yield _labelled(
        "arriero_orphans",
        "Processes without a reservation, and reservations whose process is gone.",
        {(): float(len(fleet.orphans))},
    )
    hosts = {(host.name, host.state): float(host.alive) for host in fleet.hosts}
    yield _labelled("arriero_host_up", "1 while the agent of the host sends heartbeats.", hosts, "host", "state")
    devices = [(host.name, device) for host in fleet.hosts for device in host.devices]
    names = ("host", "device", "kind")
    for field, meaning in _BYTES.items():
        sizes = {(host, one.name, one.kind): float(getattr(one, field)) for host, one in devices}
        yield _labelled(f"arriero_device_{field}_bytes", meaning, sizes, *names)
    known = {
        "utilisation_ratio": ("utilisation", "Part of the time in which the device computes."),
        "temperature_celsius": ("temperature", "Temperature."),
    }
    for name, (field, meaning) in known.items():
        values = {
            (host, one.name, one.kind): float(getattr(one, field))
            for host, one in devices
            if getattr(one, field) is not None
        }
        yield _labelled(f"arriero_device_{name}", meaning, values, *names)


def _labelled(name: str, meaning: str, values: Mapping[Any, float], *labels: str) -> GaugeMetricFamily:
    """Return a gauge; the keys of its values are tuples of the labels' values."""
    family = GaugeMetricFamily(name, meaning, labels=labels)
    for key, value in sorted(values.items()):
        family.add_metric(key, value)
    return family

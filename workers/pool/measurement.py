"""
The measurement of a pool's memory: an estimate before the load, and a measured footprint after it.

Before the load: the best estimate, from a measurement, a dry run, or the closed form of the file's header. A load that
cannot fit is refused.
After the load: one real token, so that a model that cannot compute never serves; then the memory of the process.
Allocated buffers count in full, even if they are not used yet. While the pool serves, its growth is added.

The RAM of the process is its private memory; the pages of the model's file are counted from the size of the file. Where
the system does not distinguish these (on systems other than Linux), nothing is stored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from app.catalog import header
from app.catalog.metadata import Header
from app.devices import inventory as devices
from app.devices import llama_build
from app.devices.device import CPU, HardwareKind, MeasuredDevice
from app.footprint import closed_form, configuration, estimate, footprint, measurements
from app.footprint.configuration import LoadConfiguration
from app.footprint.estimate import Estimate
from app.footprint.footprint import HOST, Footprint, FootprintSource, Share
from app.inference.requests import EmbedRequest, GenerateRequest, RerankRequest, Sampling
from app.kernel import log
from app.kernel.database import Database
from app.kernel.errors import AllocationFailed, MemoryNotEnough, Unavailable
from app.kernel.settings import Settings
from workers.engine.bindings import visible
from workers.engine.engine import LlamaEngine
from workers.engine.options import EngineOptions

_log = log.get(__name__)

#: Bytes that the worker program needs to serve, in addition to those at the time of the load: 20 MiB were measured.
_SERVING = 24 * footprint.MIB
#: Least bytes of an increase, so that slow growth is not stored at every heartbeat.
_STEP = 8 * footprint.MIB


class Measuring:
    """The memory of one pool: call `expect`, load within `loading`, call `keep`, and `grown` while it serves."""

    def __init__(
        self, settings: Settings, database: Database, read: Header, options: EngineOptions, device: str
    ) -> None:
        """
        `device` names the pool's devices: `cpu`, or GPUs by number or UUID, separated by commas.

        Raises Unavailable when llama.cpp cannot use these devices, or sees others.
        """
        self._host = settings.fleet.host_here
        self._settings = settings
        self._devices = devices.Devices(settings.fleet)
        inventory = self._devices.measure().devices
        self._gpus = () if device == CPU else tuple(_gpu_named(name, inventory) for name in device.split(","))
        for gpu in self._gpus:
            if gpu.backend not in llama_build.backends():  # the model would silently be loaded into RAM
                raise Unavailable(
                    f"the llama.cpp that is installed here ({llama_build.build()}) was built without "
                    f"{gpu.backend.label}, which {gpu.name} needs; this installs such a build on {self._host}, and "
                    f"`arriero gpu check` says what it needs: {llama_build.how_to_build(gpu.backend)}"
                )
        if not any(gpu.knows_processes for gpu in self._gpus):
            self._devices.close()  # it is not asked again
        seen = visible.check(self._gpus)
        _log.info("devices_checked", gpus=[gpu.name for gpu in self._gpus], visible=[gpu.name for gpu in seen])
        self._configuration = configuration_of(options, gpus=len(self._gpus))
        self._identity = estimate.identify(
            read,
            self._configuration,
            self._gpus,
            adapters=[header.read(lora.path) for lora in options.loras],
            projector=None if options.projector is None else header.read(options.projector),
            draft=None if options.draft is None else header.read(options.draft.path),
        )
        self._database = database
        self._before = _memory()
        self._estimate: Estimate | None = None
        self._kept: Footprint | None = None

    def close(self) -> None:
        """Close the driver."""
        self._devices.close()

    def expect(self) -> Footprint:
        """
        Return the estimated footprint of the model.

        Raises MemoryNotEnough when a device has less free memory now.
        """
        if self._before is not None:
            with self._database.work() as work:
                base = sum(self._before) + _SERVING
                measurements.record_process_memory(work, self._host, self._identity.build, CPU, base)
        exact = closed_form.closed_form(
            self._identity.header, self._configuration, gpus=len(self._gpus), draft=self._identity.draft
        )
        for share in exact.shares:  # an impossible load is refused before the dry run of llama.cpp
            self._require(share.place, share.weights + share.cache)
        self._estimate = estimate.estimate(self._identity, self._database, self._host)
        best = self._estimate.best
        _log.info("footprint_expected", source=best.source.value, bytes=_named(best.reserved()))
        for share in best.shares:
            taken = sum(self._before or ()) if share.place == HOST else 0
            self._require(share.place, share.total - share.parked - taken)
        return best

    @contextmanager
    def loading(self) -> Iterator[None]:
        """The context in which the model is loaded. An out-of-memory failure raises the margin of the next estimate."""
        try:
            yield
        except AllocationFailed:
            with self._database.work() as work:
                measurements.record_failure(work, self._identity)
            raise

    def keep(self, engine: LlamaEngine) -> Footprint | None:
        """
        Let the model generate its first token, and store its footprint. Returns None where it cannot be measured.

        Raises StepFailure when the model cannot compute.
        """
        assert self._estimate is not None, "expect comes first"
        loaded = _memory()
        _warm_up(engine, whole=bool(self._gpus) and self._configuration.gpu_layers != 0)
        if loaded is None or self._before is None:
            return None
        counted = next(one for one in self._estimate.footprints if one.source is not FootprintSource.MEASURED)
        shares, contexts = [], {}
        for share in counted.shares:
            if share.place == HOST:
                weights = counted.copied if self._configuration.mmap else share.weights
                own = loaded[0] + self._before[1] - weights - share.cache - share.output + self._allocated_later()
                process = max(own, 0) + _SERVING + self._working(HOST)
            else:
                used = self._used(self._gpus[share.place])
                if used is None:
                    return None
                context = max(used - share.weights - share.cache - share.compute, 0)
                contexts[self._gpus[share.place].uuid] = context
                process = context + self._working(share.place)
            shares.append(replace(share, process=process))
        with self._database.work() as work:
            self._kept = measurements.record_measured(work, self._identity, _measured(counted, shares))
            # With the closed form the difference would also contain the error of the formula.
            if counted.source is FootprintSource.DRY_RUN:
                for uuid, size in contexts.items():
                    measurements.record_process_memory(work, self._host, self._identity.build, uuid, size)
        _log.info("footprint_measured", bytes=_named({share.place: share.total for share in self._kept.shares}))
        return self._kept.with_margin_floor(self._estimate.margin_floor)

    def grown(self) -> Footprint | None:
        """
        Return and store the current footprint, if it is larger than the known one; otherwise return None.

        Raises DatabaseUnreachable.
        """
        memory = _memory()
        if self._kept is None or self._before is None or self._estimate is None or memory is None:
            return None
        shares = []
        for share in self._kept.shares:
            if share.place == HOST:
                mapped = share.weights - self._kept.copied if self._configuration.mmap else 0
                taken = memory[0] + self._before[1] + mapped
            else:
                taken = self._used(self._gpus[share.place]) or 0
            steps = -(-max(taken - share.total, 0) // _STEP)
            shares.append(replace(share, process=share.process + steps * _STEP))
        if tuple(shares) == self._kept.shares:
            return None
        with self._database.work() as work:
            self._kept = measurements.record_measured(work, self._identity, _measured(self._kept, shares))
        _log.warning("footprint_grown", bytes=_named({share.place: share.total for share in self._kept.shares}))
        return self._kept.with_margin_floor(self._estimate.margin_floor)

    def end(self) -> None:
        """Forget earlier out-of-memory failures: the pool has served to its end. Raises DatabaseUnreachable."""
        with self._database.work() as work:
            measurements.clear_failures(work, self._identity)

    def _require(self, place: int, needed: int) -> None:
        """Raise MemoryNotEnough when the device has fewer free bytes now."""
        device = self._gpus[place] if place != HOST else devices.ram()
        if device.total and needed > device.free:
            raise MemoryNotEnough(f"{self._identity.header.path.name} on {device.name}", needed, device.free)

    def _allocated_later(self) -> int:
        """Return the counted bytes of RAM that are allocated after the load, for the embedding context."""
        full, plain = (
            closed_form.closed_form(self._identity.header, one, gpus=len(self._gpus)).shares[0]
            for one in (self._configuration, replace(self._configuration, embedding=0))
        )
        return full.cache - plain.cache + full.output - plain.output

    def _working(self, place: int) -> int:
        own = closed_form.working_memory(self._identity.header, self._configuration, place, gpus=len(self._gpus))
        if (draft := self._identity.draft) is None:
            return own
        drafting = configuration.draft_context(self._configuration)
        return own + closed_form.working_memory(draft, drafting, place, gpus=len(self._gpus))

    def _used(self, gpu: MeasuredDevice) -> int | None:
        """Return the bytes that this process uses on a GPU; None where the driver does not report them."""
        if not gpu.knows_processes:
            return None
        now = next((device for device in self._devices.measure().devices if device.uuid == gpu.uuid), None)
        own = [process.used for process in now.processes if process.pid == os.getpid()] if now else []
        return own[0] if own else None


def configuration_of(options: EngineOptions, *, gpus: int) -> LoadConfiguration:
    """Return the load configuration of an engine with these options."""
    return configuration.of_tuning(
        options,
        slots=options.slots,
        cells=options.context,
        kv_k=options.kv_type_k,
        kv_v=options.kv_type_v,
        flash_attention=options.flash_attention,
        embeddings=options.vectors,
        gpus=gpus,
        image_tokens=options.image_tokens or 0,
        has_draft_model=options.draft is not None,
    )


def _warm_up(engine: LlamaEngine, *, whole: bool) -> None:
    """Compute a token, a vector or a score, as the model can. `whole` fills a micro-batch with the prompt."""
    if engine.generates_text:
        count = min(engine.options.ubatch, engine.options.batch, engine.context_limit - 8) if whole else 1
        engine.generate(GenerateRequest(prompt="a " * count, max_tokens=1, sampling=Sampling(temperature=0))).result()
    if engine.is_reranker:
        engine.rerank(RerankRequest("a", ("a",)))
    elif engine.options.vectors or not engine.generates_text:
        engine.embed(EmbedRequest(("a",)))


def _measured(counted: Footprint, shares: list[Share]) -> Footprint:
    margins = {share.place: footprint.measured_margin(share) for share in shares}
    return Footprint(FootprintSource.MEASURED, tuple(shares), margins, copied=counted.copied)


def _gpu_named(name: str, inventory: tuple[MeasuredDevice, ...]) -> MeasuredDevice:
    """Return the GPU with this number or UUID; a GPU that NVML does not know has zeros as figures."""
    number = f"gpu-{name.strip()}"
    for device in inventory:
        if name in {device.name, device.uuid}:
            return device
    for device in inventory:
        if device.name == number or (device.uuid and device.uuid.startswith(name.strip())):
            return device
    return MeasuredDevice(number, HardwareKind.GPU, "unknown", 0, 0, uuid=name.strip())


def _memory() -> tuple[int, int] | None:
    """Return the private bytes of this process, and those of mapped files and libraries; None if it is not Linux."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = {line.partition(":")[0]: line.partition(":")[2].split() for line in text.splitlines()}
    if "RssAnon" not in found or "RssFile" not in found:
        return None
    return int(found["RssAnon"][0]) * 1024, int(found["RssFile"][0]) * 1024


def _named(sizes: dict[int, int]) -> dict[str, int]:
    return {"ram" if place == HOST else f"gpu-{place}": size for place, size in sizes.items()}

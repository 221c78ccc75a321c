"""
Footprint estimates: the best available footprint of a model in a configuration, and its source.

The sources are, best first: a measurement of exactly this load, llama.cpp's dry run, the closed form. A source without
a result has a reason.

A child process makes the dry run, on the devices that this process is pinned to: it uses interfaces that are not
stable, and if it crashes, this process continues with the next source. The caller of a dry run on GPUs must hold a
reservation there, because the dry run creates a driver context for a moment.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from app.catalog.metadata import Header
from app.devices import inventory as devices_of_host
from app.devices import llama_build
from app.devices.device import HardwareKind, MeasuredDevice
from app.footprint import caches, closed_form, footprint, measurements
from app.footprint.closed_form import DEFAULT_PROCESS, ProcessMemory
from app.footprint.configuration import LoadConfiguration
from app.footprint.footprint import HOST, Footprint, FootprintSource, Share
from app.footprint.measurements import Identity
from app.kernel import log
from app.kernel.database import Database
from app.kernel.errors import ArrieroError

_log = log.get(__name__)

#: The module that makes a dry run. `app` never imports `workers`; it starts them as processes.
_PROBE = "workers.engine.bindings.probe"
#: A dry run only reads a header and a vocabulary; the time allows for a slow disk or a busy machine.
_TIMEOUT = timedelta(seconds=60)
#: Maximum bytes of states and records of cells, which llama.cpp allocates even in a dry run.
_MAX_ALLOCATED = 512 * footprint.MIB

_one_at_a_time = threading.Lock()


class NoDryRun(ArrieroError):
    """The dry run has no result; the message says why."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """The footprints of a model from all available sources."""

    identity: Identity
    #: At least one footprint, the best first.
    footprints: tuple[Footprint, ...]
    #: Why a source has no result.
    missing: Mapping[FootprintSource, str]
    #: Minimum margin as a part of the total; above 0 after memory ran out.
    margin_floor: float = 0.0

    @property
    def best(self) -> Footprint:
        """The footprint of the best source."""
        return self.footprints[0]


def identify(
    header: Header,
    configuration: LoadConfiguration,
    devices: Sequence[MeasuredDevice],
    *,
    adapters: Sequence[Header] = (),
    projector: Header | None = None,
    draft: Header | None = None,
) -> Identity:
    """Returns the identity of a load on these GPUs of this host, with the installed build of llama.cpp."""
    build, processor = llama_build.build(), devices_of_host.processor()
    return Identity(header, configuration, tuple(devices), build, processor, tuple(adapters), projector, draft)


def estimate(
    identity: Identity,
    database: Database | None,
    host: str,
    *,
    allow_dry_run: bool = True,
    environment: Mapping[str, str] | None = None,
) -> Estimate:
    """
    Returns the footprints of that identity on this host.

    Without a database, nothing is looked up or stored. `allow_dry_run` allows a dry run if none is stored;
    `environment` is the environment of its process.
    """
    missing: dict[FootprintSource, str] = {}
    known, process = measurements.KnownFootprint(), DEFAULT_PROCESS
    if database is not None:
        with database.work() as work:
            known = measurements.find(work, identity)
            process = measurements.process_memory(work, host, identity.build, identity.devices)
    if known.measured is None:
        missing[FootprintSource.MEASURED] = "this configuration has not run yet" if database else "no database was used"
    found = known.dry_run
    if found is None and known.measured is not None:
        missing[FootprintSource.DRY_RUN] = "not needed: a measurement exists"
    elif found is None and allow_dry_run:
        try:
            found = dry_run(identity, process, environment=environment)
        except NoDryRun as error:
            missing[FootprintSource.DRY_RUN] = str(error)
            _log.warning("dry_run_failed", model=identity.header.name, reason=str(error))
        else:
            if database is not None:
                with database.work() as work:
                    measurements.record_dry_run(work, identity, found)
    elif found is None:
        missing[FootprintSource.DRY_RUN] = _why_not_made(identity)
    closed = _closed_form(identity, process)
    best_first = [one for one in (known.measured, found, closed) if one is not None]
    footprints = tuple(one.with_margin_floor(known.margin_floor) for one in best_first)
    return Estimate(identity, footprints, missing, known.margin_floor)


def _why_not_made(identity: Identity) -> str:
    if any(device.kind is HardwareKind.SIMULATED for device in identity.devices):
        return "llama.cpp does not know simulated devices"
    return "a pool makes it when it loads the model" if identity.devices else "it was not requested"


def dry_run(
    identity: Identity, process: ProcessMemory = DEFAULT_PROCESS, *, environment: Mapping[str, str] | None = None
) -> Footprint:
    """
    Returns what llama.cpp would allocate for that identity. Raises NoDryRun.

    A child process makes the dry run, with `environment` or that of this process.
    """
    header, configuration = identity.header, identity.configuration
    states = sum(layer.state for layer in caches.layers(header)) * configuration.sequences
    if (allocated := states + caches.cell_records(header, configuration)) > _MAX_ALLOCATED:
        raise NoDryRun(
            "llama.cpp allocates the states of recurrent layers and its records of cells even in a dry run: "
            f"{allocated / footprint.MIB:,.0f} MiB"
        )
    asked = {"path": str(header.path), "configuration": configuration.as_json(), "gpus": len(identity.devices)}
    question = json.dumps(asked | ({"draft": str(identity.draft.path)} if identity.draft else {}))
    try:
        child = _run(question, environment)
    except subprocess.TimeoutExpired:
        raise NoDryRun(f"it did not end within {_TIMEOUT.total_seconds():g} s") from None
    except OSError as error:
        raise NoDryRun(f"it could not be started: {error}") from error
    if child.returncode:
        raise NoDryRun(_exit_reason(child))
    try:
        answer = json.loads(child.stdout)
    except ValueError:
        raise NoDryRun(f"it wrote {child.stdout[:100]!r} instead of an answer") from None
    if "error" in answer:
        raise NoDryRun(answer["error"])
    return _footprint(identity, process, answer)


def _closed_form(identity: Identity, process: ProcessMemory) -> Footprint:
    return closed_form.closed_form(
        identity.header,
        identity.configuration,
        gpus=len(identity.devices),
        free=[device.free for device in identity.devices],
        process=process,
        adapters=identity.adapters,
        projector=identity.projector,
        draft=identity.draft,
    )


def _run(question: str, environment: Mapping[str, str] | None) -> subprocess.CompletedProcess[str]:
    """Runs the child process. Concurrent calls run one after the other."""
    with _one_at_a_time:
        return subprocess.run(
            [sys.executable, "-m", _PROBE],
            input=question,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT.total_seconds(),
            env=environment,
            check=False,
        )


def _exit_reason(child: subprocess.CompletedProcess[str]) -> str:
    last = child.stderr.strip().splitlines()[-1:] or ["it wrote nothing"]
    if child.returncode < 0:
        return f"it was ended by {signal.Signals(-child.returncode).name}: {last[0]}"
    return f"it ended with code {child.returncode}: {last[0]}"


def _footprint(identity: Identity, process: ProcessMemory, answer: Mapping[str, Any]) -> Footprint:
    """Returns the footprint from the child's answer. What llama.cpp does not report is added as in the closed form."""
    closed = _closed_form(identity, process)
    plain = _closed_form(replace(identity, adapters=(), projector=None), process)
    shares, copied = [], 0
    output = answer["contexts"][0]["output"] + answer.get("draft", {}).get("output", 0)
    for theirs, bare in zip(closed.shares, plain.shares, strict=True):
        gpu = None if theirs.place == HOST else theirs.place
        first, *others = ([b for b in context["buffers"] if b["gpu"] == gpu] for context in answer["contexts"])
        drafting = [buffer for buffer in answer.get("draft", {}).get("buffers", ()) if buffer["gpu"] == gpu]
        every = [*first, *(buffer for context in others for buffer in context), *drafting]
        loaded = [*first, *drafting]  # the other contexts are of the same model
        weights = sum(buffer["model"] for buffer in loaded)
        if theirs.place == HOST:
            copied = sum(buffer["model"] for buffer in loaded if not buffer["name"].endswith(("CPU", "_Host")))
        shares.append(
            Share(
                theirs.place,
                weights=weights + theirs.weights - bare.weights,
                cache=sum(buffer["context"] for buffer in every),
                compute=sum(buffer["compute"] for buffer in every) + theirs.compute - bare.compute,
                output=max(theirs.output, output) if theirs.place == HOST else 0,
                process=theirs.process,
                parked=theirs.parked,
            )
        )
    made = Footprint(FootprintSource.DRY_RUN, tuple(shares), {}, copied=copied + closed.copied)
    return replace(made, margins={share.place: footprint.dry_run_margin(share) for share in shares})

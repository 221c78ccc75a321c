"""
An estimate: the best footprint that can be had for a model in a configuration, and where it comes from.

Measured for exactly this, else llama.cpp's dry run, else the closed form. A source that gives nothing says why.

The dry run is made by a child process, with the devices that this process is pinned to: it reads what has no stable
interface, and if that crashes it, this process goes on with the next source. Whoever asks for a dry run on GPUs holds a
reservation there: for a moment it takes a context of the driver's.
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
from app.footprint.closed_form import GUESS, ProcessMemory
from app.footprint.configuration import LoadConfiguration
from app.footprint.footprint import HOST, Footprint, FootprintSource, Share
from app.footprint.measurements import Identity
from app.kernel import log
from app.kernel.database import Database
from app.kernel.errors import ArrieroError

_log = log.get(__name__)

#: The module that makes a dry run. `app` never imports `workers`: it starts them.
_PROBE = "workers.engine.bindings.probe"
#: A dry run reads a header and a vocabulary; this is for a disk that sleeps, or a machine that is busy.
_TIMEOUT = timedelta(seconds=60)
#: States, and notes of cells, are allocated even in a dry run; above so many bytes none is made.
_MOST = 512 * footprint.MIB

_one = threading.Lock()


class NoDryRun(ArrieroError):
    """The dry run gave no figures; says why."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a model takes, as far as it can be told."""

    identity: Identity
    #: All that is known, the best first.
    footprints: tuple[Footprint, ...]
    #: Why a source has nothing to say.
    missing: Mapping[FootprintSource, str]
    #: Part of the total that margins have at the least, since memory ran out before.
    floor: float = 0.0

    @property
    def best(self) -> Footprint:
        """The one to believe."""
        return self.footprints[0]


def identify(
    header: Header,
    configuration: LoadConfiguration,
    devices: Sequence[MeasuredDevice],
    *,
    adapters: Sequence[Header] = (),
    projector: Header | None = None,
) -> Identity:
    """The identity of a load on these GPUs of this host, with the llama.cpp that is installed here."""
    build, processor = llama_build.build(), devices_of_host.processor()
    return Identity(header, configuration, tuple(devices), build, processor, tuple(adapters), projector)


def estimate(
    identity: Identity,
    database: Database | None,
    host: str,
    *,
    dry: bool = True,
    environment: Mapping[str, str] | None = None,
) -> Estimate:
    """
    All that can be told of that identity on this host.

    Without a database nothing is remembered. `dry` allows a dry run, if none is remembered; `environment` is for it.
    """
    missing: dict[FootprintSource, str] = {}
    known, process = measurements.KnownFootprint(), GUESS
    if database is not None:
        with database.work() as work:
            known = measurements.find(work, identity)
            process = measurements.process(work, host, identity.build, identity.devices)
    if known.measured is None:
        missing[FootprintSource.MEASURED] = "it has not run so yet" if database else "no database was asked"
    found = known.dry_run
    if found is None and known.measured is not None:
        missing[FootprintSource.DRY_RUN] = "it was measured"
    elif found is None and dry:
        try:
            found = dry_run(identity, process, environment=environment)
        except NoDryRun as error:
            missing[FootprintSource.DRY_RUN] = str(error)
            _log.warning("dry_run_failed", model=identity.header.name, reason=str(error))
        else:
            if database is not None:
                with database.work() as work:
                    measurements.keep_dry_run(work, identity, found)
    elif found is None:
        missing[FootprintSource.DRY_RUN] = _why_not_asked(identity)
    closed = _closed_form(identity, process)
    all_of_them = [one.raised(known.floor) for one in (known.measured, found, closed) if one is not None]
    return Estimate(identity, tuple(all_of_them), missing, known.floor)


def _why_not_asked(identity: Identity) -> str:
    if any(device.kind is HardwareKind.SIMULATED for device in identity.devices):
        return "llama.cpp knows nothing of simulated devices"
    return "a pool makes it when it loads the model" if identity.devices else "it was not asked for"


def dry_run(
    identity: Identity, process: ProcessMemory = GUESS, *, environment: Mapping[str, str] | None = None
) -> Footprint:
    """
    What llama.cpp would allocate for that identity, by a child process with this environment or that of this process.

    Raises NoDryRun.
    """
    header, configuration = identity.header, identity.configuration
    states = sum(layer.state for layer in caches.layers(header)) * configuration.sequences
    if (allocated := states + caches.notes(header, configuration)) > _MOST:
        raise NoDryRun(
            "llama.cpp allocates the states of recurrent layers and its notes of cells even then: "
            f"{allocated / footprint.MIB:,.0f} MiB"
        )
    question = json.dumps(
        {"path": str(header.path), "configuration": configuration.as_json(), "gpus": len(identity.devices)}
    )
    try:
        child = _run(question, environment)
    except subprocess.TimeoutExpired:
        raise NoDryRun(f"it did not end within {_TIMEOUT.total_seconds():g} s") from None
    except OSError as error:
        raise NoDryRun(f"it could not be started: {error}") from error
    if child.returncode:
        raise NoDryRun(_ending(child))
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
    )


def _run(question: str, environment: Mapping[str, str] | None) -> subprocess.CompletedProcess[str]:
    """Ask the child; one at a time, however many ask at once."""
    with _one:
        return subprocess.run(
            [sys.executable, "-m", _PROBE],
            input=question,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT.total_seconds(),
            env=environment,
            check=False,
        )


def _ending(child: subprocess.CompletedProcess[str]) -> str:
    last = child.stderr.strip().splitlines()[-1:] or ["it wrote nothing"]
    if child.returncode < 0:
        return f"it was ended by {signal.Signals(-child.returncode).name}: {last[0]}"
    return f"it ended with code {child.returncode}: {last[0]}"


def _footprint(identity: Identity, process: ProcessMemory, answer: Mapping[str, Any]) -> Footprint:
    """The answer by device. What llama.cpp does not count is added as in the closed form."""
    closed = _closed_form(identity, process)
    plain = _closed_form(replace(identity, adapters=(), projector=None), process)
    shares, copied = [], 0
    for theirs, bare in zip(closed.shares, plain.shares, strict=True):
        gpu = None if theirs.place == HOST else theirs.place
        first, *others = ([b for b in context["buffers"] if b["gpu"] == gpu] for context in answer["contexts"])
        every = [*first, *(buffer for context in others for buffer in context)]
        weights = sum(buffer["model"] for buffer in first)
        if theirs.place == HOST:
            copied = sum(buffer["model"] for buffer in first if not buffer["name"].endswith(("CPU", "_Host")))
        shares.append(
            Share(
                theirs.place,
                weights=weights + theirs.weights - bare.weights,
                cache=sum(buffer["context"] for buffer in every),
                compute=sum(buffer["compute"] for buffer in every) + theirs.compute - bare.compute,
                output=max(theirs.output, answer["contexts"][0]["output"]) if theirs.place == HOST else 0,
                process=theirs.process,
                parked=theirs.parked,
            )
        )
    made = Footprint(FootprintSource.DRY_RUN, tuple(shares), {}, copied=copied)
    return replace(made, margins={share.place: footprint.margin_of_dry_run(share) for share in shares})

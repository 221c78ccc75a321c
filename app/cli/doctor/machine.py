"""Checks of this machine: its drivers, its disk, the ports, and the files of models."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx2

from app.catalog import files
from app.catalog.serving import servability
from app.cli.client import url_of
from app.cli.doctor.finding import Finding, of_disk, ok, problem, skipped, warning
from app.cli.lifecycle import installation
from app.cli.lifecycle.installation import UP
from app.devices import llama_build
from app.devices.device import HardwareKind
from app.devices.inventory import Devices
from app.kernel import clock
from app.kernel.errors import ArrieroError, InvalidCatalog
from app.kernel.security.tls import verification
from app.kernel.settings import Settings
from app.kernel.units.sizes import rounded
from app.scheduler import needs

#: Seconds to wait for an answer of the API.
_SECONDS = 3.0
#: Free RAM below which no small model fits.
_LITTLE_RAM = 1 << 30


def drivers(settings: Settings) -> Iterator[Finding]:
    """The devices, and the build of llama.cpp."""
    devices = Devices(settings.fleet)
    try:
        found = devices.measure()
    finally:
        devices.close()
    for text in found.problems:
        cuda = "install llama-cpp-python built with CUDA: see 'Building llama.cpp' in docs/operations.md"
        driver = "check the driver with `nvidia-smi`; after an update of the driver, restart the machine"
        yield problem("drivers", text, cuda if "llama.cpp" in text else driver)
    for device in found.devices:
        detail = f"{device.name}: {device.model}, {rounded(device.free)} of {rounded(device.total)} are free"
        if device.driver:
            detail += f", driver {device.driver}"
        if device.kind is HardwareKind.CPU and device.free < _LITTLE_RAM:
            yield warning("drivers", detail, "end other programs, or use a smaller model")
        else:
            yield ok("drivers", detail)
    yield ok("drivers", f"llama.cpp of llama-cpp-python {llama_build.build()}")


def disk(settings: Settings) -> Iterator[Finding]:
    """The file system of the data directory."""
    directory = settings.data_dir
    existing = next(one for one in (directory, *directory.parents) if one.exists())
    usage = shutil.disk_usage(existing)
    yield of_disk(existing, usage.free, usage.total)
    if not _is_writable(existing):
        remedy = f"make it writable for this user, or set data_dir: chown -R $USER {existing}"
        yield problem("disk", f"{existing} is not writable for this user", remedy)


def ports(settings: Settings) -> Iterator[Finding]:
    """Whether the port of the API is ours or free."""
    found = installation.read(settings.data_dir, clock.now())
    url = found.record.api if found.record is not None and found.record.api else url_of(settings)
    is_up = found.running(UP) is not None
    try:
        answer = httpx2.get(f"{url}/healthz", timeout=_SECONDS, trust_env=False, verify=verification(url, settings.api))
        body = answer.json()
        instance = body.get("instance") if isinstance(body, dict) else None
    except httpx2.TransportError as error:
        if is_up:
            remedy = "see `arriero logs api`, or restart it: `arriero restart`"
            yield problem("ports", f"the API does not answer at {url} ({error})", remedy)
        elif _is_taken(settings):
            remedy = f"end the program (ss -ltnp 'sport = :{settings.api.port}'), or set api.port"
            yield problem("ports", f"another program listens on port {settings.api.port}", remedy)
        else:
            yield skipped("ports", f"nothing listens at {url}: `arriero up` does not run here")
        return
    except ValueError:
        instance = None
    if not isinstance(instance, str):
        remedy = f"end the program (ss -ltnp 'sport = :{settings.api.port}'), or set api.port"
        yield problem("ports", f"another program answers at {url}", remedy)
    elif found.record is not None and found.record.instance != instance:
        yield problem("ports", f"another Arriero answers at {url}", "set api.port of one of them")
    else:
        yield ok("ports", f"the API answers at {url}")


def models(settings: Settings) -> Iterator[Finding]:
    """The files of the models that pools serve."""
    try:
        catalog = files.catalog_of(settings)
    except InvalidCatalog as error:
        yield problem("models", str(error), "correct the file, then `arriero models list`")
        return
    if not settings.pools.models:
        yield ok("models", f"{len(catalog.names)} in the catalogue; pools.models names none to keep loaded")
    for name in settings.pools.models:
        try:
            model = catalog.get(name)
            if settings.fleet.simulated and needs.simulated(model, 1):
                yield ok("models", f"{name} is simulated")
                continue
            servability.check(model, settings)
        except ArrieroError as error:
            yield problem("models", str(error), f"arriero models pull {name}, or take it out of pools.models")
        else:
            yield ok("models", f"{name} can be served")


def _is_writable(path: Path) -> bool:
    probe = path / ".arriero-doctor"
    try:
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True


def _is_taken(settings: Settings) -> bool:
    if not settings.api.port:
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((settings.api.host, settings.api.port))
        except OSError:
            return True
    return False

"""
What the attempts of a worker process cost.

A pool knows its devices and their shares once it serves. Measured watts come from NVML, for GPUs that are not shared as
MIG instances; they are read at most once a second, by the thread that prices an attempt.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, Protocol

import pynvml

from app.catalog.model import Model
from app.governance.costs.pricing import Charge, DeviceShare, of_devices, of_tokens
from app.kernel import log
from app.kernel.sections.costs import CostSettings
from app.workflows.state_machine.outcomes import TokenUsage
from workers.telemetry.device_time import SharedDeviceTime

_log = log.get(__name__)

#: Seconds for which a reading of the power holds.
_FRESH = 1.0


class PowerSource(Protocol):
    """Measures the power of devices: NVML, or none on hosts without it."""

    def watts(self, uuid: str) -> Decimal | None:
        """Return the watts of the whole device now; None where nothing measures them."""


class NvmlPower:
    """The power of NVIDIA GPUs, measured by their driver. Without one nothing is known; this is logged once."""

    def __init__(self, library: Any = pynvml) -> None:
        self._nvml, self._lock = library, threading.Lock()
        self._is_open: bool | None = None
        self._kept: dict[str, tuple[float, Decimal | None]] = {}

    def watts(self, uuid: str) -> Decimal | None:
        """Return the watts of a GPU, by its UUID; None for other devices, and where the driver measures none."""
        if not uuid.startswith("GPU-"):  # of a MIG instance, NVML knows only what the whole GPU takes
            return None
        with self._lock:
            at, found = self._kept.get(uuid, (float("-inf"), None))
            if time.monotonic() - at >= _FRESH:
                found = self._read(uuid)
                self._kept[uuid] = (time.monotonic(), found)
            return found

    def _read(self, uuid: str) -> Decimal | None:
        try:
            if self._is_open is None:
                self._is_open = False
                self._nvml.nvmlInit()
                self._is_open = True
            if not self._is_open:
                return None
            milliwatts = self._nvml.nvmlDeviceGetPowerUsage(self._nvml.nvmlDeviceGetHandleByUUID(uuid))
        except pynvml.NVMLError as error:
            _log.info("power_not_measured", device=uuid, error=str(error))
            return None
        return Decimal(int(milliwatts)) / 1000


@dataclass(slots=True)
class Charges:
    """Prices the attempts of a process."""

    #: The devices of a pool, by UUID or id; empty in a control worker.
    devices: Mapping[str, DeviceShare] = field(default_factory=dict)
    time: SharedDeviceTime = field(default_factory=SharedDeviceTime)
    power: PowerSource = field(default_factory=NvmlPower)

    def priced(
        self, usage: TokenUsage, model: Model | None, settings: CostSettings, device_us: int | None
    ) -> TokenUsage:
        """
        Return the usage with what it cost.

        `device_us` is the attempt's share of the time of this pool's devices in microseconds; None outside of pools.
        """
        charge = self._charge(usage, model, settings, device_us)
        return usage if charge is None else replace(usage, cost=charge.amount, cost_basis=charge.basis)

    def _charge(
        self, usage: TokenUsage, model: Model | None, settings: CostSettings, device_us: int | None
    ) -> Charge | None:
        if model is not None and model.remote is not None:
            return of_tokens(
                model.remote.prices, settings.currency, usage.tokens_in, usage.tokens_cached, usage.tokens_out
            )
        if device_us is None:
            return None
        shares = self.devices.items()
        if settings.kwh is None:
            return of_devices(settings, [share for _, share in shares], device_us)
        return of_devices(settings, [replace(share, watts=self.power.watts(id_)) for id_, share in shares], device_us)

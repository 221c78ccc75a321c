"""`arriero devices`: the devices of this host and their memory, measured now."""

from __future__ import annotations

import typer
from rich.text import Text

from app.api.fleet.devices import measured_devices
from app.cli.output import AsJson, console, notes, print_json, settings_of, table
from app.devices.inventory import Devices
from app.kernel.units.sizes import rounded


def devices(context: typer.Context, as_json: AsJson = False) -> None:
    """
    List the devices of this host: its RAM, its GPUs, and those that the settings declare.

    Used memory includes the memory of all processes. If a control group limits this process, its limit counts as the
    size of RAM. What cannot be measured is reported on standard error.
    """
    measuring = Devices(settings_of(context).fleet)
    try:
        found = measured_devices(measuring)
    finally:
        measuring.close()
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    printed = table(
        ("device", "what", "total", "used", "free", "busy", "°C", "processes", "uuid"),
        right=("total", "used", "free", "busy", "°C", "processes"),
    )
    for device in found.devices:
        printed.add_row(
            Text(device.name, "magenta" if device.simulated else ""),
            device.model + (f" (limited by {device.limited_by})" if device.limited_by else ""),
            rounded(device.total),
            "-" if device.simulated else rounded(device.used),
            rounded(device.free),
            "-" if device.utilisation is None else f"{device.utilisation:.0%}",
            "-" if device.temperature is None else str(device.temperature),
            str(len(device.processes)) if device.uuid else "-",
            device.uuid or "-",
        )
    console().print(printed)
    for problem in found.problems:
        notes().print(Text.assemble(("warning: ", "yellow"), problem), soft_wrap=True)

"""The section `fleet` of the settings: the devices of this host."""

from __future__ import annotations

from pydantic import Field, field_validator

from app.kernel.section import Section
from app.kernel.sizes import Size


class SimulatedDevice(Section):
    """A device that is not there, for trials of a fleet that one does not have. Its name says so in every view."""

    name: str = Field(pattern=r"^sim-[a-z0-9-]{1,28}$", description="sim- and up to 28 lower-case letters, digits, '-'")
    #: Its memory.
    bytes: Size = Field(ge=1024 * 1024, description="a size such as '24GiB', at least 1MiB")
    #: Tokens a second, as a multiple of what the catalogue says of a model.
    speed: float = Field(default=1.0, gt=0, le=1000, description="a number above 0, at most 1000")
    #: Bytes of a model's file that are loaded in a second.
    bandwidth: Size = Field(default=2_000_000_000, ge=1024 * 1024, description="a size such as '2GB', at least 1MiB")


class FleetSettings(Section):
    """The devices of this host."""

    #: Devices that are not there, for trials; as tables in arriero.toml, as a JSON list in a variable.
    simulated: tuple[SimulatedDevice, ...] = ()

    @field_validator("simulated")
    @classmethod
    def _have_names_of_their_own(cls, value: tuple[SimulatedDevice, ...]) -> tuple[SimulatedDevice, ...]:
        names = [device.name for device in value]
        if double := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{double!r} is the name of two devices: give each its own")
        return value

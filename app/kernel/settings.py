"""
The settings: the only reader of the environment.

Defaults give way to `arriero.toml`, that to the environment, that to the command line.
Every value knows where it came from; a wrong one is refused by its key, its origin and what would be accepted.
A variable or key that does not exist is refused too: a silent typo would be a silent default.

Nothing here opens a connection or makes a directory.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from app.kernel import durations
from app.kernel.durations import Duration
from app.kernel.errors import InvalidSettings, Problem
from app.kernel.sizes import Size

#: Names the file when neither `--config` nor the default place is wanted. It is no setting.
CONFIG_VARIABLE = "ARRIERO_CONFIG"
#: The file that is read from the current directory when there is one.
CONFIG_FILE = "arriero.toml"

_PREFIX = "ARRIERO_"
_DELIMITER = "__"


class Section(BaseModel):
    """A table of `arriero.toml`."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class LogSettings(Section):
    """What is logged, and how."""

    #: Lines below this level are dropped.
    level: Literal["debug", "info", "warning", "error"] = "info"
    #: `auto` gives columns at a terminal and JSON elsewhere.
    format: Literal["auto", "columns", "json"] = "auto"


class ApiSettings(Section):
    """The HTTP interface."""

    host: str = "127.0.0.1"
    port: int = Field(default=8470, ge=0, le=65535, description="0 takes a free port")
    #: Where commands of this host find the API, when that is not the address above.
    url: str = Field(default="", pattern=r"^(https?://.+)?$")
    #: Bytes of one request body; a larger one is refused with 413.
    max_body_bytes: int = Field(default=4 * 1024 * 1024, ge=1024)


class FlowerSettings(Section):
    """The page that watches the Celery workers."""

    host: str = "127.0.0.1"
    port: int = Field(default=5555, ge=0, le=65535, description="0 takes a free port")


class BrokerSettings(Section):
    """How the Celery broker is spoken to. Equal on every host: the timeout is judged by whoever sweeps."""

    #: After this, an unacknowledged message is delivered again. Messages are acknowledged at once,
    #: so it is met only by one that a dying worker had taken and not yet accepted.
    visibility_timeout: Duration = timedelta(minutes=2)
    #: A connection that answers nothing for this long is given up.
    socket_timeout: Duration = timedelta(seconds=30)


class RunSettings(Section):
    """Leases and sweeps: how soon lost work is found."""

    #: A step whose holder has not renewed for this long is taken from it.
    lease: Duration = timedelta(seconds=15)
    #: Holders renew this often. At most a third of the lease.
    heartbeat: Duration = timedelta(seconds=3)
    #: The sweep looks for lost messages, ended leases and due retries this often.
    sweep_every: Duration = timedelta(seconds=1)
    #: A step that is ready for this long with no message waiting is published again.
    republish_after: Duration = timedelta(seconds=5)
    #: Attempts of one step that may end with their worker's death before it is given up.
    max_worker_losses: int = Field(default=3, ge=1)

    @field_validator("heartbeat")
    @classmethod
    def _is_well_below_the_lease(cls, value: timedelta, info: Any) -> timedelta:
        lease = info.data.get("lease")
        if lease is not None and value * 3 > lease:
            raise ValueError(f"must be at most a third of runs.lease ({durations.show(lease)})")
        return value


class CatalogSettings(Section):
    """Which models can be served."""

    #: Catalogues read after the shipped one; an entry of the same name replaces an earlier one.
    files: tuple[Path, ...] = ()
    #: Folders that `arriero models scan` reads for GGUF files.
    folders: tuple[Path, ...] = ()
    #: The Hugging Face hub, or a mirror with the same paths.
    hub: str = Field(default="https://huggingface.co", pattern=r"^https?://.+$")
    #: A token of the hub, for gated and private models. It goes to the hub alone, and into no message.
    hub_token: SecretStr | None = None


class ControlSettings(Section):
    """The control workers, which run steps without a model and the scheduled jobs."""

    #: Threads of one control worker.
    concurrency: int = Field(default=8, ge=1, le=256)
    #: Control workers that `arriero up` starts.
    processes: int = Field(default=1, ge=1, le=64)


class PoolSettings(Section):
    """The processes that hold a model."""

    #: Models that are kept up: each has a pool somewhere that is never stopped to make room. Equal on every host.
    models: tuple[str, ...] = ("smollm2:135m",)
    #: Cores of this host that pools may use for llama.cpp in all; 0 takes all but one. Its threads wait by spinning:
    #: where another process uses one of their cores, all of them stand still.
    threads: int = Field(default=0, ge=0)
    #: A pool that has not begun to serve by then is ended.
    start_timeout: Duration = timedelta(minutes=5)
    #: How long a pool may finish its steps after it was asked to stop.
    drain_timeout: Duration = timedelta(seconds=20)


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
    """The devices of this host, and how pools are placed on all hosts. What concerns all is equal on every host."""

    #: The name of this host in the fleet; empty for its network name. No two hosts share one.
    host: str = Field(default="", max_length=100)
    #: Devices that are not there, for trials; as tables in arriero.toml, as a JSON list in a variable.
    simulated: tuple[SimulatedDevice, ...] = ()
    #: Bytes of this host's RAM that pools may hold in all; 0 takes four fifths of it.
    ram: Size = 0
    #: Bytes of each GPU that stay free whatever is placed on it.
    head_room: Size = 512 * 1024 * 1024
    #: What is desired is compared with what is asked for this often, besides whenever that changes.
    reconcile_every: Duration = timedelta(seconds=1)
    #: Agents and pools are heard this often.
    heartbeat: Duration = timedelta(seconds=2)
    #: A pool that could not renew its claim on memory for so long ends itself. Longer than the database may be away.
    lease: Duration = timedelta(minutes=1)
    #: Nothing new is placed on a host whose agent was not heard for so long.
    agent_lease: Duration = timedelta(seconds=10)
    #: A host of which neither agent nor pools were heard for so long is taken for lost.
    host_lost_after: Duration = timedelta(minutes=2)
    #: An agent has so long to begin a pool that was granted.
    begin_within: Duration = timedelta(seconds=30)
    #: A pool whose engine has work and makes no progress for so long is killed.
    progress_timeout: Duration = timedelta(minutes=2)

    @field_validator("heartbeat")
    @classmethod
    def _is_heard_in_time(cls, value: timedelta) -> timedelta:
        if not timedelta(milliseconds=50) <= value <= timedelta(seconds=30):
            raise ValueError("must be from 50ms to 30s")
        return value

    @field_validator("lease", "agent_lease")
    @classmethod
    def _outlasts_three_heartbeats(cls, value: timedelta, info: Any) -> timedelta:
        heartbeat = info.data.get("heartbeat")
        if heartbeat is not None and value < heartbeat * 3:
            raise ValueError(f"must be at least three times fleet.heartbeat ({durations.show(heartbeat)})")
        return value

    @field_validator("simulated")
    @classmethod
    def _have_names_of_their_own(cls, value: tuple[SimulatedDevice, ...]) -> tuple[SimulatedDevice, ...]:
        names = [device.name for device in value]
        if double := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{double!r} is the name of two devices: give each its own")
        return value


class Settings(BaseSettings):
    """Every setting of Arriero. Keys are dotted paths: `api.port` is `ARRIERO_API__PORT`."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, env_nested_delimiter=_DELIMITER, extra="forbid", frozen=True, validate_default=True
    )

    #: Embedded servers, downloaded models and logs live below it.
    data_dir: Path = Field(default_factory=lambda: Path(platformdirs.user_data_dir("arriero")))
    #: An outside Postgres (15 or later, with pgvector), as `postgresql://…`; without it, one is embedded.
    database_url: SecretStr | None = None
    #: An outside Redis (7 or later) or Valkey, as `redis://…`; without it, one is embedded.
    redis_url: SecretStr | None = None

    log: LogSettings = LogSettings()
    api: ApiSettings = ApiSettings()
    flower: FlowerSettings = FlowerSettings()
    broker: BrokerSettings = BrokerSettings()
    runs: RunSettings = RunSettings()
    catalog: CatalogSettings = CatalogSettings()
    control: ControlSettings = ControlSettings()
    pools: PoolSettings = PoolSettings()
    fleet: FleetSettings = FleetSettings()

    @field_validator("data_dir")
    @classmethod
    def _is_absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @field_validator("database_url")
    @classmethod
    def _names_postgres(cls, value: SecretStr | None) -> SecretStr | None:
        return _with_scheme(value, ("postgresql", "postgres"))

    @field_validator("redis_url")
    @classmethod
    def _names_redis(cls, value: SecretStr | None) -> SecretStr | None:
        return _with_scheme(value, ("redis", "rediss", "valkey", "valkeys", "redis+socket", "unix"))

    @classmethod
    def settings_customise_sources(  # type: ignore[override] # the three sources that are not used stay unnamed
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 the signature is pydantic's
        init_settings: PydanticBaseSettingsSource,
        **_: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `load` hands over: the sources are merged there, where their origins are known."""
        return (init_settings,)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings, and for each dotted key where its value came from."""

    settings: Settings
    #: `default`, a file's path, a variable's name, or `command line`.
    origins: Mapping[str, str]


def load(
    *,
    environment: Mapping[str, str] | None = None,
    config: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Loaded:
    """
    Read the settings from all their places.

    `environment` defaults to the process's own. `config` is the file given on the command line; else the one
    that `ARRIERO_CONFIG` names, else `arriero.toml` of the current directory if there is one.
    `overrides` are dotted keys given on the command line.

    Raises InvalidSettings with every problem found.
    """
    variables = os.environ if environment is None else environment
    origins: dict[str, str] = {}
    merged: dict[str, Any] = {}

    file = _config_file(variables, config)
    layers: list[tuple[dict[str, Any], str]] = []
    if file is not None:
        layers.append((_read_file(file), str(file)))
    layers.append((_read_environment(variables), ""))
    given = {key: _listed(value) if key in _lists() else value for key, value in (overrides or {}).items()}
    layers.append((_nested(given), "command line"))

    for layer, origin in layers:
        for path, value in _leaves(layer):
            key = ".".join(path)
            origins[key] = origin or variable(key)
            _put(merged, path, value)

    unknown = [_unknown(key, origins[key]) for key in origins if key not in _keys()]
    try:
        settings = Settings(**merged)
    except ValidationError as error:
        problems = [_problem(item, origins) for item in error.errors() if not _is_unknown_key(item)]
        raise InvalidSettings([*unknown, *problems]) from None
    if unknown:
        raise InvalidSettings(unknown)
    return Loaded(settings, {key: origins.get(key, "default") for key in _keys()})


def environment_of(settings: Settings) -> dict[str, str]:
    """
    The process's environment with these settings in it, for a child process.

    Secrets are in it, as they are in any environment: only processes of the same user can read them.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith(_PREFIX)}
    values = {variable(key): _as_text(value) for key, value in values_of(settings) if value is not None}
    return {**inherited, **values}


def values_of(settings: Settings) -> Iterator[tuple[str, Any]]:
    """Every dotted key with its value, in the order of their definition."""
    for key in _keys():
        value: Any = settings
        for part in key.split("."):
            value = getattr(value, part)
        yield key, value


def shown(value: Any) -> Any:
    """A value as `arriero config show` prints it: secrets masked, the rest as one would write it."""
    if isinstance(value, SecretStr):
        secret = value.get_secret_value()
        return masked_url(secret) if "://" in secret else "***"
    if isinstance(value, timedelta):
        return durations.show(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [shown(item) for item in value]
    if isinstance(value, Section):
        return value.model_dump(mode="json")
    return value


def masked_url(url: str) -> str:
    """The URL with its password, and the values of its query, replaced by stars."""
    head, mark, query = url.partition("?")
    if mark:
        query = "&".join(f"{part.partition('=')[0]}=***" for part in query.split("&"))
    scheme, slashes, rest = head.partition("://")
    credentials, at, place = rest.rpartition("@")
    user, colon, _ = credentials.partition(":")
    return f"{scheme}{slashes}{user}{':***' if colon else ''}{at}{place}{mark}{query}"


def _with_scheme(value: SecretStr | None, schemes: Sequence[str]) -> SecretStr | None:
    if value is not None and value.get_secret_value().partition("://")[0] not in schemes:
        raise ValueError(f"must begin with {' or '.join(f'{scheme}://' for scheme in schemes)}")
    return value


def _config_file(variables: Mapping[str, str], given: Path | None) -> Path | None:
    named = given or (Path(variables[CONFIG_VARIABLE]) if variables.get(CONFIG_VARIABLE) else None)
    if named is not None:
        if not named.is_file():
            source = "--config" if given else CONFIG_VARIABLE
            raise InvalidSettings([Problem(source, f"there is no file {named}", "the path of a TOML file")])
        return named
    here = Path(CONFIG_FILE)
    return here if here.is_file() else None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidSettings([Problem(str(path), f"this is no TOML: {error}")]) from None


def _read_environment(variables: Mapping[str, str]) -> dict[str, Any]:
    given = {
        name.upper(): value
        for name, value in variables.items()
        if name.upper().startswith(_PREFIX) and name.upper() != CONFIG_VARIABLE
    }
    nested = _nested({_key(name): value for name, value in given.items()})
    for key in _keys():
        if (name := variable(key)) in given and key in _lists():
            _put(nested, key.split("."), _listed(given[name]))
    return nested


def _listed(value: Any) -> Any:
    """A list that was written as a text: a JSON list, or parts with commas."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("[") and isinstance(given := _json(value), list):
        return tuple(given)
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _json(text: str) -> Any:
    """The JSON value, or None where the text is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        _put(nested, key.split("."), value)
    return nested


def _put(nested: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for part in path[:-1]:
        inner = nested.get(part)
        if not isinstance(inner, dict):
            inner = nested[part] = {}
        nested = inner
    nested[path[-1]] = value


def _leaves(nested: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in nested.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*above, name))
        else:
            yield (*above, name), value


def _keys() -> tuple[str, ...]:
    keys: list[str] = []
    for name, field in Settings.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            keys.extend(f"{name}.{inner}" for inner in section.model_fields)
        else:
            keys.append(name)
    return tuple(keys)


def _lists() -> frozenset[str]:
    return frozenset(key for key, value in values_of(Settings.model_construct()) if isinstance(value, tuple))


def _secrets() -> frozenset[str]:
    return frozenset(key for key in _keys() if key.endswith(("_url", "_token")))


def variable(key: str) -> str:
    """The name of the environment variable of a setting."""
    return _PREFIX + key.replace(".", _DELIMITER).upper()


def _key(variable: str) -> str:
    return variable.removeprefix(_PREFIX).lower().replace(_DELIMITER, ".")


def _as_text(value: Any) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, tuple) and any(isinstance(item, Section) for item in value):
        return json.dumps(shown(value))
    if isinstance(value, tuple):
        return ",".join(_as_text(item) for item in value)
    return str(shown(value))


def _unknown(key: str, origin: str) -> Problem:
    name = origin if origin.startswith(_PREFIX) else key
    close = difflib.get_close_matches(key, _keys(), n=1)
    hint = f"did you mean {variable(close[0]) if name == origin else close[0]}?" if close else ""
    return Problem(name, f"there is no such setting ({_place(origin)})", hint or "see `arriero config show`")


def _is_unknown_key(item: ErrorDetails) -> bool:
    """Whether this is a key that `load` names itself, with its origin; keys inside lists are left to pydantic."""
    return item["type"] == "extra_forbidden" and not any(isinstance(part, int) for part in item["loc"])


def _problem(item: ErrorDetails, origins: Mapping[str, str]) -> Problem:
    key = ".".join(str(part) for part in item["loc"] if not isinstance(part, int))
    above = [".".join(key.split(".")[:count]) for count in range(key.count(".") + 1, 0, -1)]
    origin = next((origins[k] for k in above if k in origins), None)
    origin = origin or next((o for k, o in origins.items() if k.startswith(f"{key}.")), "default")
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"]).lstrip(".")
    message = item["msg"].removeprefix("Value error, ")
    given = item.get("input")
    secret = isinstance(given, SecretStr) or key in _secrets()
    value = "" if secret or isinstance(given, dict | tuple) else f"{given!r}: "
    return Problem(where, f"{value}{message} ({_place(origin)})", _accepted(item["loc"]))


def _accepted(place: Sequence[int | str]) -> str:
    """What a key of a table in a list would take, or which keys that table has."""
    if not any(isinstance(part, int) for part in place):
        return ""
    fields = SimulatedDevice.model_fields  # the only tables in a list
    field = fields.get(str(place[-1]))
    return (field.description or "") if field else ", ".join(fields)


def _place(origin: str) -> str:
    if origin in {"command line", "default"}:
        return f"from the {origin}"
    return f"from the variable {origin}" if origin.startswith(_PREFIX) else f"from {origin}"

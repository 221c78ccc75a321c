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
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from app.kernel.errors import InvalidSettings, Problem
from app.kernel.fleet_settings import FleetSettings, SimulatedDevice
from app.kernel.http_settings import HttpSettings
from app.kernel.section import Section
from app.kernel.security.request_guard import TrustedHost
from app.kernel.units import durations
from app.kernel.units.durations import Duration

#: Names the file when neither `--config` nor the default place is wanted. It is no setting.
CONFIG_VARIABLE = "ARRIERO_CONFIG"
#: The file that is read from the current directory when there is one.
CONFIG_FILE = "arriero.toml"

#: Begins the variables that are secrets of steps. They are no settings: `app.kernel.security.secrets` hands them out.
SECRET_PREFIX = "ARRIERO_SECRET_"  # noqa: S105 the beginning of a name
#: Names of secrets, in lower case.
SECRET_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")

_PREFIX = "ARRIERO_"
_DELIMITER = "__"


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
    #: Bytes of inputs, of an output, of the outputs of all steps, that are shown with a run; others are fetched by
    #: themselves. 0 shows none.
    max_inline_bytes: int = Field(default=1024 * 1024, ge=0)


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
    #: Finished runs are kept for this long, where neither workflow nor client says how long.
    retention: Duration = timedelta(days=30)
    #: Runs whose retention is over are looked for this often.
    expire_every: Duration = timedelta(minutes=5)
    #: Bytes (as JSON) of inputs, an output, an item or an event up to which they stay in their row. Longer ones are
    #: stored beside it, each once.
    inline_bytes: int = Field(default=64 * 1024, ge=0)
    #: Bytes of one of these at the most; the items' outputs of a map count as one.
    max_payload_bytes: int = Field(default=64 * 1024 * 1024, ge=1024, le=512 * 1024 * 1024)
    #: Bytes of outputs that one step or expression sees at the most.
    max_read_bytes: int = Field(default=256 * 1024 * 1024, ge=1024)

    @field_validator("heartbeat")
    @classmethod
    def _is_well_below_the_lease(cls, value: timedelta, info: Any) -> timedelta:
        lease = info.data.get("lease")
        if lease is not None and value * 3 > lease:
            raise ValueError(f"must be at most a third of runs.lease ({durations.show(lease)})")
        return value


class ScheduleSettings(Section):
    """Schedules of workflows."""

    #: Schedules are looked through for due fires this often: a fire is late by at most this, and a moment.
    check_every: Annotated[Duration, durations.at_least("100ms")] = timedelta(seconds=1)
    #: How long it is kept what became of a fire.
    keep_fires: Annotated[Duration, durations.at_least("1m")] = timedelta(days=30)


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
    #: Where each pool answers Prometheus. 0 takes a free port, which the pool writes to `DATA/metrics/NAME.json`.
    metrics_host: str = "127.0.0.1"
    metrics_port: int = Field(default=0, ge=0, le=65535, description="0 takes a free port")
    #: A pool that has not begun to serve by then is ended.
    start_timeout: Annotated[Duration, durations.at_least("1s")] = timedelta(minutes=5)
    #: How long a pool may finish its steps after it was asked to stop.
    drain_timeout: Duration = timedelta(seconds=20)


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
    #: A directory with a file for each secret of steps, as Docker and Kubernetes make them.
    secrets_dir: Path | None = None
    #: More hosts by which API, Flower and metrics are called: `a.example.com`, `*.example.com`; their pages may call.
    trusted_hosts: tuple[TrustedHost, ...] = ()

    log: LogSettings = LogSettings()
    api: ApiSettings = ApiSettings()
    flower: FlowerSettings = FlowerSettings()
    broker: BrokerSettings = BrokerSettings()
    runs: RunSettings = RunSettings()
    schedules: ScheduleSettings = ScheduleSettings()
    catalog: CatalogSettings = CatalogSettings()
    control: ControlSettings = ControlSettings()
    pools: PoolSettings = PoolSettings()
    fleet: FleetSettings = FleetSettings()
    http: HttpSettings = HttpSettings()

    @field_validator("data_dir", "secrets_dir")
    @classmethod
    def _is_absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()

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
    unknown += [
        Problem(SECRET_PREFIX + name.upper(), "this is no name of a secret", "letters, digits and underscores")
        for name in secret_variables(variables)
        if not SECRET_NAME.fullmatch(name)
    ]
    try:
        settings = Settings(**merged)
    except ValidationError as error:
        problems = [_problem(item, origins) for item in error.errors() if not _is_unknown_key(item)]
        raise InvalidSettings([*unknown, *problems]) from None
    if unknown:
        raise InvalidSettings(unknown)
    return Loaded(settings, {key: origins.get(key, "default") for key in _keys()})


def secret_variables(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The secrets of steps that stand in the environment: names in lower case, and their values."""
    variables = os.environ if environment is None else environment
    return {name.upper().removeprefix(SECRET_PREFIX).lower(): variables[name] for name in variables if _is_secret(name)}


def environment_of(settings: Settings) -> dict[str, str]:
    """
    The process's environment with these settings in it, for a child process.

    Secrets are in it, as they are in any environment: only processes of the same user can read them.
    """
    inherited = {
        name: value for name, value in os.environ.items() if not name.upper().startswith(_PREFIX) or _is_secret(name)
    }
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
        if name.upper().startswith(_PREFIX) and name.upper() != CONFIG_VARIABLE and not _is_secret(name)
    }
    nested = _nested({_key(name): value for name, value in given.items()})
    for key in _keys():
        if (name := variable(key)) in given and key in _lists():
            _put(nested, key.split("."), _listed(given[name]))
    return nested


def _is_secret(variable: str) -> bool:
    return variable.upper().startswith(SECRET_PREFIX)


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

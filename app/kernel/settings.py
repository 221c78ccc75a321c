"""
The settings: the only reader of the environment.

Precedence, from lowest to highest: defaults, `arriero.toml`, the environment, the command line, and for those that are
`changeable` the run-time values of the installation (`app/kernel/live/`). The file is that of the
current directory, or else that of the data directory.
The origin of every value is known; an invalid one is refused with its key, its origin and what would be accepted.
An unknown variable or key is refused too: otherwise a typo would silently leave the default. A secret may be in a file.

Nothing here opens a connection or creates a directory.
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
from functools import cache
from pathlib import Path
from typing import Any, cast, get_args

import platformdirs
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from app.kernel.errors import InvalidSettings, Problem
from app.kernel.postgres import address
from app.kernel.sections.access import AccessSettings, AuditSettings, LimitSettings
from app.kernel.sections.agents import AgentSettings
from app.kernel.sections.blocks import BlockSettings
from app.kernel.sections.cache import CacheSettings
from app.kernel.sections.catalog import CatalogSettings
from app.kernel.sections.consolidation import ConsolidationSettings
from app.kernel.sections.context import ContextSettings
from app.kernel.sections.costs import CostSettings
from app.kernel.sections.files import BatchSettings, FileSettings
from app.kernel.sections.fleet import FleetSettings, SimulatedDevice
from app.kernel.sections.governance import ActionSettings, AlertSettings, ServingSettings
from app.kernel.sections.handoffs import HandoffSettings
from app.kernel.sections.hooks import HookDefinition
from app.kernel.sections.http import HttpSettings
from app.kernel.sections.images import ImageSettings
from app.kernel.sections.mail import MailSettings
from app.kernel.sections.memories import MemorySettings
from app.kernel.sections.memory import ConversationSettings
from app.kernel.sections.peers import PeerSettings
from app.kernel.sections.predictions import PredictionSettings
from app.kernel.sections.probes import ProbeSettings
from app.kernel.sections.recall import RecallSettings
from app.kernel.sections.rules import RuleSettings, SignalSettings
from app.kernel.sections.scaler import ScalerSettings
from app.kernel.sections.section import CHANGEABLE, Section
from app.kernel.sections.servers import ApiSettings, BrokerSettings, FlowerSettings, LogSettings, TlsSettings
from app.kernel.sections.splits import SplitSettings
from app.kernel.sections.tools import ToolSettings
from app.kernel.sections.tracing import TracingSettings
from app.kernel.sections.verification import VerificationSettings
from app.kernel.sections.work import ControlSettings, PoolSettings, RunSettings, ScheduleSettings
from app.kernel.security import secret_files
from app.kernel.security.request_guard import TrustedHost
from app.kernel.units import durations

#: The variable with the path of the file, unless `--config` is given. It is not a setting.
CONFIG_VARIABLE = "ARRIERO_CONFIG"
#: The file that is read from the current directory if it exists, or else from the data directory.
CONFIG_FILE = "arriero.toml"

#: Prefix of the variables for secrets of steps. They are not settings: `app.kernel.security.secrets` reads them.
SECRET_PREFIX = "ARRIERO_SECRET_"  # noqa: S105 a prefix
#: Names of secrets, in lower case.
SECRET_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")

_PREFIX = "ARRIERO_"
_DELIMITER = "__"


class Settings(BaseSettings):
    """Every setting of Arriero. Keys are dotted paths: `api.port` is `ARRIERO_API__PORT`."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, env_nested_delimiter=_DELIMITER, extra="forbid", frozen=True, validate_default=True
    )

    #: The directory of embedded servers, downloaded models and logs.
    data_dir: Path = Field(default_factory=lambda: Path(platformdirs.user_data_dir("arriero")))
    #: An external Postgres (15 or later, with pgvector), as `postgresql://…`; without it, an embedded one is started.
    #: With several hosts and `?target_session_attrs=read-write`, programs use whichever takes writes.
    database_url: SecretStr | None = None
    #: An external Redis (7 or later) or Valkey, as `redis://…`; without it, an embedded Valkey is started.
    redis_url: SecretStr | None = None
    #: A directory with one file per secret of steps, as Docker and Kubernetes create it.
    secrets_dir: Path | None = None
    #: Further accepted host names of API, Flower and metrics, whose pages may send requests: `a.com`, `*.a.com`.
    trusted_hosts: tuple[TrustedHost, ...] = ()

    log: LogSettings = LogSettings()
    api: ApiSettings = ApiSettings()
    access: AccessSettings = AccessSettings()
    agents: AgentSettings = AgentSettings()
    flower: FlowerSettings = FlowerSettings()
    broker: BrokerSettings = BrokerSettings()
    tls: TlsSettings = TlsSettings()
    runs: RunSettings = RunSettings()
    schedules: ScheduleSettings = ScheduleSettings()
    predictions: PredictionSettings = PredictionSettings()
    catalog: CatalogSettings = CatalogSettings()
    control: ControlSettings = ControlSettings()
    pools: PoolSettings = PoolSettings()
    fleet: FleetSettings = FleetSettings()
    peers: PeerSettings = PeerSettings()
    http: HttpSettings = HttpSettings()
    tools: ToolSettings = ToolSettings()
    cache: CacheSettings = CacheSettings()
    limits: LimitSettings = LimitSettings()
    costs: CostSettings = CostSettings()
    audit: AuditSettings = AuditSettings()
    files: FileSettings = FileSettings()
    batches: BatchSettings = BatchSettings()
    images: ImageSettings = ImageSettings()
    conversations: ConversationSettings = ConversationSettings()
    memories: MemorySettings = MemorySettings()
    consolidation: ConsolidationSettings = ConsolidationSettings()
    blocks: BlockSettings = BlockSettings()
    context: ContextSettings = ContextSettings()
    recall: RecallSettings = RecallSettings()
    probes: ProbeSettings = ProbeSettings()
    splits: SplitSettings = SplitSettings()
    verification: VerificationSettings = VerificationSettings()
    signals: SignalSettings = SignalSettings()
    rules: RuleSettings = RuleSettings()
    tracing: TracingSettings = TracingSettings()
    actions: ActionSettings = ActionSettings()
    scaler: ScalerSettings = ScalerSettings()
    alerts: AlertSettings = AlertSettings()
    serving: ServingSettings = ServingSettings()
    handoffs: HandoffSettings = HandoffSettings()
    mail: MailSettings = MailSettings()
    #: Hooks on requests to models, as tables `[[hooks]]` in arriero.toml or as a JSON list in a variable.
    hooks: tuple[HookDefinition, ...] = Field(default=(), max_length=100)

    @field_validator("data_dir", "secrets_dir")
    @classmethod
    def _made_absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()

    @field_validator("hooks")
    @classmethod
    def _are_named_once(cls, value: tuple[HookDefinition, ...]) -> tuple[HookDefinition, ...]:
        names = [hook.name for hook in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two hooks have the name {', '.join(twice)}")
        return value

    @field_validator("database_url")
    @classmethod
    def _is_an_address_of_postgres(cls, value: SecretStr | None) -> SecretStr | None:
        _with_scheme(value, ("postgresql", "postgres"))
        return value and SecretStr(address.normalize(value.get_secret_value()))

    @field_validator("redis_url")
    @classmethod
    def _has_a_redis_scheme(cls, value: SecretStr | None) -> SecretStr | None:
        return _with_scheme(value, ("redis", "rediss", "valkey", "valkeys", "redis+socket", "unix"))

    @classmethod
    def settings_customise_sources(  # type: ignore[override] # the three unused sources are in **_
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 the signature is pydantic's
        init_settings: PydanticBaseSettingsSource,
        **_: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Use only the arguments of `load`, which merges all sources and records the origins."""
        return (init_settings,)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings, with the origin of each value by its dotted key."""

    settings: Settings
    #: `default`, the path of a file, the name of a variable, or `command line`.
    origins: Mapping[str, str]


def load(
    *,
    environment: Mapping[str, str] | None = None,
    config: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Loaded:
    """
    Read the settings from all their sources.

    `environment` defaults to that of the process. `config` is the file of the command line; without it, the file is
    that of `ARRIERO_CONFIG`, or the first `arriero.toml` that exists: in the current directory, in the data directory.
    `overrides` are the dotted keys of the command line.

    Raises InvalidSettings with every problem found.
    """
    variables = os.environ if environment is None else environment
    origins: dict[str, str] = {}
    merged: dict[str, Any] = {}

    given = {key: _parse_list(value) if key in _lists() else value for key, value in (overrides or {}).items()}
    from_environment, named = _read_environment(variables)
    layers = [(from_environment, ""), (_nested(given), "command line")]
    file = _config_file(variables, config, next((of["data_dir"] for of, _ in layers[::-1] if of.get("data_dir")), None))
    if file is not None:
        layers.insert(0, (_read_file(file), str(file)))

    for layer, origin in layers:
        for path, value in _leaves(layer):
            key = ".".join(path)
            origins[key] = origin or named.get(variable(key), variable(key))
            _put(merged, path, value)

    unknown = [_unknown(key, origins[key]) for key in origins if key not in _fields()]
    unknown += [
        Problem(SECRET_PREFIX + name.upper(), "not a valid name of a secret", "letters, digits and underscores")
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
    return Loaded(settings, {key: origins.get(key, "default") for key in _fields()})


def changeable() -> tuple[str, ...]:
    """Return the keys of the settings that may change while the processes run."""
    return tuple(key for key, of in _fields().items() if CHANGEABLE in of.metadata)


def default_of(key: str) -> Any:
    """Return the default of a setting."""
    return _fields()[key].get_default(call_default_factory=True)


def with_values(settings: Settings, values: Mapping[str, Any], origin: str) -> Settings:
    """
    Return the settings with other values, by dotted keys; a list may be written as a text.

    Raises InvalidSettings with every problem, as `load` does. `origin` is where the values come from.
    """
    origins = dict.fromkeys(values, origin)
    problems = [_unknown(key, origin) for key in values if key not in _fields()]
    sections: dict[str, Any] = {}
    given = {key: _parse_list(value) if key in _lists() else value for key, value in values.items()}
    for name, changed in _nested({key: value for key, value in given.items() if key in _fields()}).items():
        section = getattr(settings, name)
        assert isinstance(section, Section), "only settings of sections are changed"
        known = {field: getattr(section, field) for field in type(section).model_fields}
        try:
            sections[name] = type(section).model_validate(known | changed)
        except ValidationError as error:
            items = [{**item, "loc": (name, *item["loc"])} for item in error.errors()]
            problems += [_problem(cast("ErrorDetails", item), origins) for item in items]
    if problems:
        raise InvalidSettings(problems)
    return settings.model_copy(update=sections)


def value_of(settings: Settings, key: str) -> Any:
    """Return the value of a dotted key."""
    value: Any = settings
    for part in key.split("."):
        value = getattr(value, part)
    return value


def secret_variables(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the secrets of steps in the environment, by their names in lower case."""
    variables = os.environ if environment is None else environment
    return {name.upper().removeprefix(SECRET_PREFIX).lower(): variables[name] for name in variables if _is_secret(name)}


def environment_of(settings: Settings) -> dict[str, str]:
    """
    Return the environment of this process together with these settings, for a child process.

    It contains secrets: only processes of the same user can read it.
    """
    inherited = {
        name: value for name, value in os.environ.items() if not name.upper().startswith(_PREFIX) or _is_secret(name)
    }
    values = {variable(key): _as_text(value) for key, value in values_of(settings) if value is not None}
    return {**inherited, **values}


def values_of(settings: Settings) -> Iterator[tuple[str, Any]]:
    """Yield every dotted key with its value, in the order of their definition."""
    for key in _fields():
        yield key, value_of(settings, key)


def shown(value: Any) -> Any:
    """Return a value for `arriero config show`: secrets masked, other values in the format of the settings."""
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
    """Return the URL with its password and the values of its query replaced by stars."""
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


def _config_file(variables: Mapping[str, str], given: Path | None, data_dir: str | Path | None) -> Path | None:
    named = given or (Path(variables[CONFIG_VARIABLE]) if variables.get(CONFIG_VARIABLE) else None)
    if named is not None:
        if not named.is_file():
            source = "--config" if given else CONFIG_VARIABLE
            raise InvalidSettings([Problem(source, f"there is no file {named}", "the path of a TOML file")])
        return named
    data_dir = data_dir or _fields()["data_dir"].get_default(call_default_factory=True)
    files = (CONFIG_FILE, f"{os.path.expanduser(data_dir)}/{CONFIG_FILE}")  # noqa: PTH111 Path's raises errors
    return next((Path(file) for file in files if os.path.isfile(file)), None)  # noqa: PTH113 as above


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidSettings([Problem(str(path), f"the file is not valid TOML: {error}")]) from None


def _read_environment(variables: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values, and by variable the one that names the file of its value."""
    given = {
        name.upper(): value
        for name, value in variables.items()
        if name.upper().startswith(_PREFIX) and name.upper() != CONFIG_VARIABLE and not _is_secret(name)
    }
    given, named = secret_files.revealed(given, [variable(key) for key in _secrets()])
    nested = _nested({_key(name): value for name, value in given.items()})
    for key in _fields():
        if (name := variable(key)) in given and key in _lists():
            _put(nested, key.split("."), _parse_list(given[name]))
    return nested, named


def _is_secret(variable: str) -> bool:
    return variable.upper().startswith(SECRET_PREFIX)


def _parse_list(value: Any) -> Any:
    """Parse a list that is written as a text: a JSON list, or comma-separated values."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("[") and isinstance(given := _json(value), list):
        return tuple(given)
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _json(text: str) -> Any:
    """Return the JSON value, or None when the text is not JSON."""
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
        if isinstance(value, dict) and (value or isinstance(getattr(Settings.model_construct(), name, None), Section)):
            yield from _leaves(value, (*above, name))
        else:
            yield (*above, name), value


@cache
def _fields() -> Mapping[str, FieldInfo]:
    found: dict[str, FieldInfo] = {}
    for name, field in Settings.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)  # of a section
        found |= {name: field} if inner is None else {f"{name}.{key}": of for key, of in inner.items()}
    return found


def _lists() -> frozenset[str]:
    return frozenset(key for key, value in values_of(Settings.model_construct()) if isinstance(value, tuple))


def _secrets() -> frozenset[str]:
    return frozenset(key for key, of in _fields().items() if SecretStr in (of.annotation, *get_args(of.annotation)))


def variable(key: str) -> str:
    """Return the name of the environment variable of a setting."""
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
    close = difflib.get_close_matches(key, _fields(), n=1)
    hint = f"did you mean {variable(close[0]) if name == origin else close[0]}?" if close else ""
    return Problem(name, f"there is no such setting ({_source(origin)})", hint or "see `arriero config show`")


def _is_unknown_key(item: ErrorDetails) -> bool:
    """Whether `load` reports this key itself, with its origin; pydantic reports keys inside lists."""
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
    return Problem(where, f"{value}{message} ({_source(origin)})", _accepted(item["loc"]))


def _accepted(place: Sequence[int | str]) -> str:
    """Return the accepted values for a key of a table in a list, or the keys of that table."""
    if not any(isinstance(part, int) for part in place):
        return ""
    fields = (HookDefinition if place[0] == "hooks" else SimulatedDevice).model_fields  # the only tables in a list
    field = fields.get(str(place[-1]))
    return (field.description or "") if field else ", ".join(fields)


def _source(origin: str) -> str:
    if origin in {"command line", "default"}:
        return f"from the {origin}"
    return f"from the variable {origin}" if origin.startswith(_PREFIX) else f"from {origin}"

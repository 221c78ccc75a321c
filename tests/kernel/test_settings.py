"""Settings: four sources, known origins, masked secrets, and errors that name the key."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from app.kernel import settings
from app.kernel.errors import InvalidSettings
from app.kernel.settings import environment_of, load, masked_url, shown, values_of
from app.kernel.units import durations, sizes


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run outside the checkout, so that its arriero.toml is not read."""
    monkeypatch.chdir(tmp_path)


def refused(**given: str) -> str:
    with pytest.raises(InvalidSettings) as caught:
        load(environment={name.upper(): value for name, value in given.items()})
    return str(caught.value)


def test_each_source_overrides_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "arriero.toml").write_text("[api]\nport = 1001\nhost = '::1'\n[runs]\nlease = '30s'\n")
    loaded = load(environment={"ARRIERO_API__PORT": "1002"}, overrides={"runs.lease": "45s"})

    assert (loaded.settings.api.port, loaded.settings.api.host) == (1002, "::1")
    assert loaded.settings.runs.lease == timedelta(seconds=45)
    assert loaded.origins["api.port"] == "ARRIERO_API__PORT"
    assert loaded.origins["api.host"] == "arriero.toml"
    assert loaded.origins["runs.lease"] == "command line"
    assert loaded.origins["runs.heartbeat"] == "default"


def test_the_file_can_be_chosen(tmp_path: Path) -> None:
    file = tmp_path / "other.toml"
    file.write_text("[log]\nlevel = 'debug'\n")

    assert load(environment={"ARRIERO_CONFIG": str(file)}).settings.log.level == "debug"
    assert load(environment={}, config=file).origins["log.level"] == str(file)
    with pytest.raises(InvalidSettings, match="there is no file"):
        load(environment={}, config=tmp_path / "nothing.toml")


def test_child_processes_have_the_same_settings() -> None:
    given = load(
        environment={
            "ARRIERO_DATABASE_URL": "postgresql://u:p@h/d",
            "ARRIERO_POOLS__MODELS": "a:1, b:2",
            "ARRIERO_RUNS__LEASE": "1h30m",
            "ARRIERO_CATALOG__FILES": "/x/a.toml,/y/b.toml",
        }
    ).settings
    again = load(environment={k: v for k, v in environment_of(given).items() if k.startswith("ARRIERO_")}).settings

    assert again == given
    assert again.pools.models == ("a:1", "b:2")


def test_an_empty_list_stays_empty() -> None:
    given = load(environment={"ARRIERO_POOLS__MODELS": ""}).settings

    assert given.pools.models == ()
    assert environment_of(given)["ARRIERO_POOLS__MODELS"] == ""


def test_invalid_values_are_reported_with_key_origin_and_accepted_values() -> None:
    assert "api.port: 'http': Input should be a valid integer" in refused(arriero_api__port="http")
    assert "(from the variable ARRIERO_API__PORT)" in refused(arriero_api__port="http")
    assert "'debug', 'info', 'warning' or 'error'" in refused(arriero_log__level="loud")
    assert "at most a third of runs.lease (6s)" in refused(arriero_runs__lease="6s")
    assert durations.ACCEPTED in refused(arriero_runs__lease="soon")
    assert "'http://a.b' is not a host: write a host such as 'api.example.com'" in refused(
        arriero_http__allowed_hosts="api.example.com,http://a.b"
    )
    assert "postgresql://" in refused(arriero_database_url="mysql://u:p@h/d")
    assert "fleet.reconcile_every: '0': must be at least 100ms" in refused(arriero_fleet__reconcile_every="0")
    assert "must be at least fleet.agent_lease (10s)" in refused(arriero_fleet__host_lost_after="5s")
    assert "'much' is not a size" in refused(arriero_fleet__ram="much")


def test_a_misspelt_key_is_refused(tmp_path: Path) -> None:
    assert "did you mean ARRIERO_API__PORT?" in refused(arriero_api__prt="1")
    (tmp_path / "arriero.toml").write_text("[api]\nprt = 1\n")
    with pytest.raises(InvalidSettings, match=r"api.prt: there is no such setting \(from arriero.toml\).*api.port"):
        load(environment={})


def test_all_problems_are_reported_at_once() -> None:
    text = refused(arriero_api__port="x", arriero_log__level="y", arriero_nothing="z")

    assert text.count("\n") == 3


def test_a_file_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "arriero.toml").write_text("[api\n")
    with pytest.raises(InvalidSettings, match="the file is not valid TOML"):
        load(environment={})


def test_secrets_are_masked_and_never_in_messages() -> None:
    given = load(
        environment={
            "ARRIERO_DATABASE_URL": "postgresql://ada:swordfish@h:1/d?sslmode=require&sslpassword=swordfish",
            "ARRIERO_REDIS_URL": "redis://:swordfish@h:1/0",
            "ARRIERO_CATALOG__HUB_TOKEN": "hf_swordfish",
        }
    ).settings
    printed = [str(shown(value)) for _, value in values_of(given)]

    assert not any("swordfish" in text for text in printed)
    assert "postgresql://ada:***@h:1/d?sslmode=***&sslpassword=***" in printed
    assert "swordfish" not in repr(given)
    assert "swordfish" not in refused(arriero_database_url="mysql://u:swordfish@h/d")


def test_urls_without_secrets_are_not_changed() -> None:
    assert masked_url("redis://h:1/0") == "redis://h:1/0"


def test_every_key_has_its_own_variable() -> None:
    names = [settings.variable(key) for key, _ in values_of(load(environment={}).settings)]

    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("15s", 15), ("2m", 120), ("1h30m", 5400), ("7d", 604800), ("500ms", 0.5), (90, 90), ("1.5", 1.5), (0, 0)],
)
def test_durations_are_parsed_and_formatted(text: str | int, seconds: float) -> None:
    parsed = durations.parse(text)

    assert parsed == timedelta(seconds=seconds)
    assert durations.parse(durations.show(parsed)) == parsed


@pytest.mark.parametrize("text", ["", "soon", "-1s", "5 apples", "1s2", True, -1, float("inf"), float("nan"), "99999d"])
def test_invalid_durations_are_refused(text: object) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        durations.parse(text)


def test_tables_in_a_list_come_from_files_and_variables(tmp_path: Path) -> None:
    (tmp_path / "arriero.toml").write_text(
        '[[fleet.simulated]]\nname = "sim-0"\nbytes = "24GiB"\n'
        '[[fleet.simulated]]\nname = "sim-1"\nbytes = 80000000000\n'
    )
    given = load(environment={}).settings
    assert [device.bytes for device in given.fleet.simulated] == [24 * 2**30, 80 * 10**9]

    variables = {key: text for key, text in environment_of(given).items() if key.startswith("ARRIERO_")}
    (tmp_path / "arriero.toml").unlink()
    assert load(environment=variables).settings == given


def test_an_invalid_table_in_a_list_is_reported_with_its_position(tmp_path: Path) -> None:
    (tmp_path / "arriero.toml").write_text('[[fleet.simulated]]\nname = "gpu"\nspede = 1\nbytes = "24 apples"\n')
    with pytest.raises(InvalidSettings) as caught:
        load(environment={})
    text = str(caught.value)
    assert "fleet.simulated[0].name: 'gpu'" in text
    assert "(from arriero.toml); accepted: sim-" in text
    assert "fleet.simulated[0].spede" in text
    assert "name, bytes, speed, bandwidth" in text
    assert "'24 apples' is not a size" in text
    assert "the name of two" in refused(
        arriero_fleet__simulated='[{"name":"sim-a","bytes":"1GB"},{"name":"sim-a","bytes":"2GB"}]'
    )


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * 2**30), ("1.5 kB", 1500), (7, 7), ("80GB", 80 * 10**9), ("0", 0)]
)
def test_sizes_are_parsed_and_formatted(text: str | int, size: int) -> None:
    assert sizes.parse(text) == size
    assert sizes.parse(sizes.show(size)) == size


@pytest.mark.parametrize("text", ["", "much", "-1", -1, True, 1.5, "5 apples", 2**60, "1e9", None])
def test_invalid_sizes_are_refused(text: object) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        sizes.parse(text)


def test_the_file_of_the_current_directory_comes_before_that_of_the_data_directory(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "arriero.toml").write_text("[api]\nport = 1001\n[log]\nlevel = 'debug'\n")
    variables = {"ARRIERO_DATA_DIR": str(data)}

    of_data = load(environment=variables)
    assert (of_data.settings.api.port, of_data.origins["api.port"]) == (1001, str(data / "arriero.toml"))
    assert load(environment={}, overrides={"data_dir": data}).settings.api.port == 1001
    other = load(environment=variables, overrides={"data_dir": tmp_path / "nothing"})
    assert other.settings.api.port == 8470, "the command line names another data directory"

    (tmp_path / "arriero.toml").write_text("[api]\nport = 1002\n")
    of_here = load(environment=variables)
    assert (of_here.settings.api.port, of_here.settings.log.level) == (1002, "info")
    (tmp_path / "chosen.toml").write_text("")
    assert load(environment=variables, config=tmp_path / "chosen.toml").settings.api.port == 8470


@pytest.mark.parametrize("path", ["/nothing\0", "/proc/1/root/x", "/" + "x" * 5000])
def test_a_data_directory_that_cannot_be_read_has_no_file(path: str) -> None:
    assert load(environment={}, overrides={"data_dir": path}).settings.api.port == 8470

"""The planner's configuration of a model, and its backoff after failures."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from app.catalog import catalog
from app.catalog.model import Model
from app.fleet import backoff
from app.fleet.backoff import PastPool
from app.footprint.layout import KnownLayout
from app.kernel.errors import InvalidCatalog
from app.scheduler import needs
from app.scheduler.needs import OperatorTarget

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def model(more: str = "", source: str = "{ path = '/a.gguf', size = 1000000000 }") -> Model:
    text = f"[[models]]\nname = 'm:1'\nuse_cases = ['chat']\nslots = 4\nsource = {source}\n{more}"
    return catalog.parse(text, "catalog.toml").models[0]


def known(type_: str, *parts: int) -> KnownLayout:
    return KnownLayout("m-1.x", type_, parts, "closed form", timedelta(seconds=5), 10.0)


def test_the_id_depends_on_what_is_loaded_only() -> None:
    first = needs.configuration_id(model())
    assert first.startswith("m-1.")
    assert needs.configuration_id(model("description = 'other'\npools = { max = 2 }")) == first
    assert needs.configuration_id(model("context = 2048")) != first
    assert needs.configuration_id(model(source="{ path = '/b.gguf' }")) != first


def test_gpus_come_first_and_simulated_devices_only_where_no_host_has_the_file() -> None:
    layouts = [known("simulated", 1), known("cpu", 2), known("L4", 3, 3), known("L4", 4)]
    made = needs.configuration_of(model(), layouts, {"h": timedelta(0)})

    assert [(one.type, one.parts) for one in made.layouts] == [("L4", (4,)), ("L4", (3, 3)), ("cpu", (2,))]
    made = needs.configuration_of(model(), layouts[:1], {"h": timedelta(0)})
    assert [(one.type, one.parts) for one in made.layouts] == [("simulated", (1,))]


def test_reserves_and_targets_become_pools() -> None:
    made = needs.configuration_of(
        model("pools = { max = 1, keep_alive = 'forever', reserve = { slots = 9, within = '3s' } }"),
        [],
        {},
        OperatorTarget(pools=2, pinned=True),
    )

    assert made.reserve is not None
    assert (made.reserve.pools, made.reserve.within) == (3, timedelta(seconds=3))
    assert (made.min_pools, made.max_pools, made.pinned, made.keep_alive) == (2, 2, True, None)


def test_a_simulated_layout_has_the_numbers_of_the_entry_or_of_its_file() -> None:
    given = needs.simulated(model("simulated = { bytes = '2GiB', load = '1s', tokens_per_second = 50 }"), 10**9)
    guessed = needs.simulated(model(), 10**9)
    assert given is not None
    assert guessed is not None
    assert (given.parts, given.tokens_per_second) == ((2 * 2**30,), 50.0)
    assert (guessed.parts, guessed.load - given.load) == ((1_100_000_000 + 512 * 2**20,), timedelta(0))
    assert needs.simulated(model(source="{ path = '/a.gguf' }"), 10**9) is None


def test_invalid_pools_are_refused_with_their_line() -> None:
    with pytest.raises(InvalidCatalog, match=r"models\[0\]\.pools.*min is 3, max is 2"):
        model("pools = { min = 3, max = 2 }")
    with pytest.raises(InvalidCatalog, match=r"pools\.keep_alife.*did you mean keep_alive"):
        model("pools = { keep_alife = '5m' }")
    with pytest.raises(InvalidCatalog, match=r"pools\.keep_alive \(line \d+\): 'soon' is not a duration") as refused:
        model("pools = { keep_alive = 'soon' }")
    assert len(refused.value.problems) == 1


@pytest.mark.parametrize(
    ("given", "kept"), [("'5m'", timedelta(minutes=5)), ("0", timedelta(0)), ("'forever'", None), ("-1", None)]
)
def test_keep_alive_is_read_from_the_entry(given: str, kept: timedelta | None) -> None:
    entry = model(f"pools = {{ keep_alive = {given} }}")
    assert needs.configuration_of(entry, (), {}).keep_alive == kept
    assert entry.model_dump(mode="json")["pools"]["keep_alive"] in {"5m", "0s", "forever"}


def past(ago: float, *, failed: bool = True, served: bool = False, host: str = "h") -> PastPool:
    return PastPool("m", host, NOW - timedelta(seconds=ago), failed, served, f"broke {ago:g}")


def until(*history: PastPool, cleared: datetime | None = None) -> list[tuple[str, float]]:
    found = backoff.backoffs(history, {"m": cleared} if cleared else {}, NOW)
    return [(one.host, (one.until - NOW).total_seconds()) for one in found]


def test_the_backoff_doubles_with_failures_in_a_row() -> None:
    assert until(past(1)) == [("h", 1.0)]
    assert until(past(3)) == []
    assert until(past(30), past(20), past(1)) == [("h", 7.0)]
    assert until(*(past(ago) for ago in (50, 40, 30, 20, 10))) == [("h", 1790.0)], "quarantine"
    assert until(past(1), past(1, host="g")) == [("h", 1.0), ("g", 1.0)]


def test_a_pool_that_served_or_ended_well_and_a_command_end_the_backoff() -> None:
    assert until(past(30), past(20, failed=False), past(1)) == [("h", 1.0)]
    assert until(past(30), past(1, served=True)) == [("h", 1.0)], "it counts as the first failure"
    assert until(*(past(ago) for ago in (50, 40, 30, 20, 10)), cleared=NOW - timedelta(seconds=5)) == []


def test_a_pool_that_served_and_died_once_is_started_again_at_once() -> None:
    """Steps wait for it. One that dies again within a minute backs off."""
    assert until(past(1, served=True)) == []
    assert until(past(120), past(1, served=True)) == []
    assert until(past(59, served=True), past(1, served=True)) == [("h", 1.0)]


def test_a_backoff_says_how_often_and_how_it_failed() -> None:
    (found,) = backoff.backoffs([past(30), past(1)], {}, NOW)
    assert found.reason == "it failed 2 times in a row, most recently: broke 1"

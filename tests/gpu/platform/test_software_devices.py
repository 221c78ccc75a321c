"""Memory of two software GPUs under the whole platform: pinned, evicted, killed, frozen, refused, used at once."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import httpx2
import pytest

from tests.gpu.platform.conftest import (
    DEVICES,
    HUGE,
    MODELS,
    SIZE,
    assert_nothing_is_overcommitted,
    ended,
    log,
    on,
    pools,
    serving,
    started,
    submit,
    succeed,
    why_not,
)
from tests.live.conftest import Live, until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]


def test_each_pool_is_on_a_device_of_its_own_and_sees_no_other(tree: Live) -> None:
    found = [serving(tree, model) for model in MODELS[:2]]

    assert {on(pool) for pool in found} == set(DEVICES)
    for pool in found:
        (checked,) = (line for line in log(tree, pool) if line["event"] == "devices_checked")
        assert (checked["gpus"], checked["visible"]) == ([on(pool)], ["Vulkan0"])
        (expected,) = (line for line in log(tree, pool) if line["event"] == "footprint_expected")
        assert expected["source"] == "dry run"
        reserved = sum(size for id_, size in pool["bytes"].items() if on(pool) in id_)
        assert SIZE // 2 < reserved <= SIZE
    assert_nothing_is_overcommitted(tree)


def test_two_pools_on_two_devices_write_at_the_same_time(tree: Live) -> None:
    """
    Both are the same processor, so each is slower; but neither waits for the other, and little is lost together.

    After kills this would not hold: a pool may then be split over both devices.
    """
    tokens, names = 24, MODELS[:2]
    for name in names:
        serving(tree, name)
    assert len({on(pool) for pool in pools(tree) if pool["model"] in names and pool["state"] == "serving"}) == 2

    def work(run_id: str) -> tuple[datetime, datetime]:
        attempt = succeed(tree, run_id)["steps"][0]["attempts"][-1]
        return datetime.fromisoformat(attempt["started_at"]), datetime.fromisoformat(attempt["finished_at"])

    alone = [end - begin for begin, end in (work(submit(tree, name, tokens)) for name in names)]
    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(lambda name: work(submit(tree, name, tokens)), names))
    together = max(end for _, end in both) - min(begin for begin, _ in both)
    shared = min(end for _, end in both) - max(begin for begin, _ in both)
    assert shared > 0.5 * min(end - begin for begin, end in both), "they worked at the same time"
    assert together < 2 * sum(alone, start=alone[0] * 0), "at least half of the throughput of one after the other"


def test_a_third_model_loads_after_the_bytes_of_the_first_are_back(tree: Live) -> None:
    first = [serving(tree, model) for model in MODELS[:2]]
    third = serving(tree, MODELS[2])

    (victim,) = (pool for pool in first if on(pool) == on(third))
    gone = ended(tree, victim["id"])
    assert not gone["failed"]
    assert datetime.fromisoformat(gone["ended_at"]) <= started(tree, third)
    assert_nothing_is_overcommitted(tree)


def test_the_bytes_of_a_killed_pool_are_back_before_the_next_load(tree: Live) -> None:
    before = serving(tree, MODELS[0])
    run_id = submit(tree, MODELS[0], tokens=6)
    os.kill(before["pid"], signal.SIGKILL)

    succeed(tree, run_id)
    after = serving(tree, MODELS[0])
    gone = ended(tree, before["id"])
    assert gone["failed"]
    assert "SIGKILL" in gone["ending"]
    assert after["id"] != before["id"]
    assert datetime.fromisoformat(gone["ended_at"]) <= started(tree, after)


def test_a_frozen_pool_is_killed_and_its_bytes_are_back_before_the_next_load(tree: Live) -> None:
    before = serving(tree, MODELS[1])
    run_id = submit(tree, MODELS[1], tokens=6)
    os.kill(before["pid"], signal.SIGSTOP)

    succeed(tree, run_id)
    after = serving(tree, MODELS[1])
    gone = ended(tree, before["id"])
    assert gone["failed"]
    assert after["id"] != before["id"]
    assert datetime.fromisoformat(gone["ended_at"]) <= started(tree, after)
    assert_nothing_is_overcommitted(tree)


def test_a_model_that_is_larger_than_all_devices_is_refused_before_any_load(tree: Live) -> None:
    run_id = submit(tree, HUGE)

    def refused() -> bool:
        found = httpx2.get(f"{tree.api}/v1/fleet/explain", params={"model": HUGE}, timeout=30).json()
        assert found["condition"] != "served", found
        return found["condition"] == "refused" and "needs" in found["reason"]

    until(refused)
    httpx2.post(f"{tree.api}/v1/runs/{run_id}/cancel", json={}, timeout=30).raise_for_status()
    assert tree.until_ended(run_id)["state"] == "cancelled"
    assert [pool for pool in pools(tree, ended=True) if pool["model"] == HUGE] == [], "no process was started for it"
    assert len([pool for pool in pools(tree) if pool["state"] == "serving"]) > 0, "and no pool had to go for it"

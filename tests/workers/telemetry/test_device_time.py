"""The shares of requests add up to the time in which there was one, and never to more."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pynvml
from hypothesis import given
from hypothesis import strategies as st

from workers.telemetry.charges import NvmlPower
from workers.telemetry.device_time import SharedDeviceTime
from workers.telemetry.work import WorkCollector, WorkFigures

SECOND = 1_000_000_000


class Clock:
    def __init__(self) -> None:
        self.at = 0

    def __call__(self) -> int:
        return self.at


def test_two_at_a_time_pay_half_each() -> None:
    clock = Clock()
    shared = SharedDeviceTime(clock)
    first = shared.begin()
    clock.at = SECOND
    second = shared.begin()
    clock.at = 3 * SECOND
    assert shared.end(first) == 2_000_000
    clock.at = 4 * SECOND
    assert shared.end(second) == 2_000_000
    clock.at = 100 * SECOND
    third = shared.begin()
    assert shared.end(third) == 0, "idle time is nobody's"


@given(st.lists(st.tuples(st.integers(0, 10 * SECOND), st.booleans()), max_size=60), st.randoms())
def test_shares_add_up_to_the_busy_time(moves: list[tuple[int, bool]], chance: Any) -> None:
    clock = Clock()
    shared = SharedDeviceTime(clock)
    open_, busy, paid, ended = list[int](), 0, 0, 0
    for passed, begins in [*moves, *[(SECOND, False)] * len(moves)]:
        clock.at += passed
        busy += passed if open_ else 0
        if begins:
            open_.append(shared.begin())
        elif open_:
            paid += shared.end(open_.pop(chance.randrange(len(open_))))
            ended += 1
    assert not open_
    # Whole microseconds are paid, so each request may leave one over.
    assert busy // 1000 - 2 * ended <= paid <= busy // 1000


class Driver:
    """NVML as far as power is concerned: one GPU that takes 350.5 W."""

    def __init__(self) -> None:
        self.readings = 0

    def nvmlInit(self) -> None:  # noqa: N802 the driver's name
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802 as above
        if uuid != "GPU-1":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802 as above
        assert handle == "GPU-1"
        self.readings += 1
        return 350_500


def test_power_is_read_once_a_second_and_unknown_where_nothing_measures_it() -> None:
    driver = Driver()
    power = NvmlPower(driver)
    assert [power.watts("GPU-1") for _ in range(100)] == [Decimal("350.5")] * 100
    assert driver.readings < 20
    assert power.watts("GPU-2") is None
    assert power.watts("MIG-1") is None
    assert power.watts("h/ram") is None


def test_costs_of_models_are_counted_for_prometheus() -> None:
    figures = WorkFigures()
    for cost in (Decimal("0.000000000001"), Decimal("1.5"), None):
        figures.count_cost("m", cost)
    assert figures.costs() == {"m": (Decimal("1.500000000001"), 1)}
    found = {
        sample.name: (sample.labels["model"], sample.value)
        for metric in WorkCollector({"worker": "w"}, figures).collect()
        for sample in metric.samples
    }
    assert found["arriero_model_cost_total"] == ("m", 1.500000000001)
    assert found["arriero_model_unpriced_attempts_total"] == ("m", 1)

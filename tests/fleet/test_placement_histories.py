"""Plans one after the other, on simulated fleets and the real ledger: nothing thrashes, nobody starves."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.fleet.fleet import Configuration, Device, Priority
from app.fleet.policy import Policy
from benchmarks.fleet_simulator import Failure, Outcome, Request, Simulation, Workload
from benchmarks.fleet_workloads import gpus, model
from benchmarks.scheduling import Arriero

POLICY = Policy()


def simulated(
    devices: tuple[Device, ...],
    models: tuple[Configuration, ...],
    requests: list[Request],
    failures: tuple[Failure, ...] = (),
) -> Outcome:
    length = max((request.ready for request in requests), default=0.0)
    outcome = Simulation(Workload(devices, models, tuple(requests), length, failures), Arriero(POLICY)).run()
    assert outcome.overcommitments == 0
    assert outcome.refused_grants == 0, "the ledger refuses nothing that is planned"
    return outcome


def waits(outcome: Outcome, configuration: str) -> list[float]:
    return [request.started - request.ready for request in outcome.requests if request.configuration == configuration]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_random_histories_keep_the_ledgers_promises_and_serve_everybody(seed: int) -> None:
    chance = Random(seed)
    devices = gpus([chance.choice((11.0, 22.0)) for _ in range(chance.choice((2, 4)))])
    largest = max(device.capacity_bytes for device in devices) / 10**9
    kept = model("kept", chance.uniform(1, 3), min_pools=chance.randrange(2))
    models = (kept, *(model(f"m{n}", chance.uniform(1, largest - 3)) for n in range(4)))
    requests = [
        Request(
            chance.choice(models).id,
            chance.choice(tuple(Priority)),
            chance.choice("ab"),
            chance.uniform(0, 120),
            500,
            100,
            then=((chance.choice(models).id, 100, 50),) * chance.randrange(2),
        )
        for _ in range(40)
    ]
    failures = (Failure(60, "gpu-0", 30),) if chance.random() < 0.3 else ()
    outcome = simulated(devices, models, requests, failures)

    assert len(outcome.requests) == sum(1 + len(request.then) for request in requests)
    assert [request for request in outcome.requests if math.isnan(request.finished)] == []


@pytest.mark.parametrize("rate", [0.1, 0.5, 2.0])
def test_two_models_that_never_fit_together_do_not_thrash(rate: float) -> None:
    """Whatever comes in turn: a device with work loads for a bounded part of the time, or only when it is idle."""
    models = (model("a", 14), model("b", 15))
    requests = [Request("ab"[n % 2], Priority.STANDARD, "", n / rate, 500, 200) for n in range(int(300 * rate))]
    outcome = simulated(gpus((22.0,), 1), models, requests)

    loads = [configuration.layouts[0].load.total_seconds() for configuration in models]
    assert outcome.loads <= 2 + len(requests)
    busy = outcome.end - outcome.loading_seconds
    if rate > 1:  # it never runs out of work
        assert outcome.loading_seconds <= busy / POLICY.amortise + 2 * max(loads)


def test_a_model_that_fits_is_served_though_another_never_stops() -> None:
    """Of the same class: within the bound, what a start must pay for, and the work in flight."""
    models = (model("hot", 14), model("cold", 15))
    requests = [Request("hot", Priority.STANDARD, "a", n * 0.5, 500, 200) for n in range(1200)]
    requests.append(Request("cold", Priority.STANDARD, "b", 100, 500, 200))
    outcome = simulated(gpus((22.0,), 1), models, sorted(requests, key=lambda request: request.ready))

    load = models[0].layouts[0].load.total_seconds()
    assert max(waits(outcome, "cold")) < POLICY.bound[Priority.STANDARD] + (POLICY.amortise + 2) * load + 30

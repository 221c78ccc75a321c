"""The rules of the ledger: grants and refusals, and random histories against simulated processes that use the bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.fleet.ledger import rules
from app.fleet.ledger.reservation import (
    Ledger,
    Quota,
    ReservationRefused,
    ReservationRequest,
    ReservationState,
    ReservedCapacity,
)
from app.kernel.errors import LeaseLost

T = TypeVar("T")

NOW = datetime(2030, 1, 1, tzinfo=UTC)
LATER = NOW + timedelta(minutes=1)


def granted(result: Ledger | ReservationRefused) -> Ledger:
    assert isinstance(result, Ledger), result
    return result


def wanted(id_: str, bytes_: Mapping[str, int], **more: object) -> ReservationRequest:
    made = ReservationRequest(
        id_, epoch=int(id_.strip("r") or 0) + 100, host="h", configuration="m", bytes=bytes_, lease_until=LATER
    )
    return replace(made, **more)  # type: ignore[arg-type] # fields of several types


@pytest.fixture
def ledger() -> Ledger:
    return rules.join(Ledger(), "h", 1, {"a": 100, "b": 100})


def serving(ledger: Ledger, id_: str, bytes_: Mapping[str, int], **more: object) -> Ledger:
    return rules.activate(granted(rules.claim(ledger, wanted(id_, bytes_, **more))), id_, 1, LATER)


def test_a_claim_is_granted_on_all_its_devices_or_refused_with_the_figures(ledger: Ledger) -> None:
    ledger = granted(rules.claim(ledger, wanted("r1", {"a": 60, "b": 10})))
    assert (ledger.free("a"), ledger.free("b")) == (40, 90)

    assert rules.claim(ledger, wanted("r2", {"b": 50, "a": 50})) == ReservationRefused(
        "needs 50 B of a, which has 40 B free"
    )


@pytest.mark.parametrize(
    ("claim", "why"),
    [
        (wanted("r1", {}), "at least one device"),
        (wanted("r1", {"a": 0}), "bytes above 0 for each"),
        (wanted("r1", {"a": 1, "x": 1}), "no device x on host h"),
        (wanted("r1", {"a": 1}, host="elsewhere"), "no device a on host elsewhere"),
    ],
)
def test_an_invalid_claim_is_refused(ledger: Ledger, claim: ReservationRequest, why: str) -> None:
    refused = rules.claim(ledger, claim)
    assert isinstance(refused, ReservationRefused)
    assert why in refused.reason


def test_bytes_of_a_victim_pass_only_to_the_claim_that_waits_for_them(ledger: Ledger) -> None:
    ledger = serving(ledger, "r1", {"a": 80})
    assert isinstance(rules.claim(ledger, wanted("r2", {"a": 90}, after=frozenset({"r1"}))), ReservationRefused), (
        "the victim does not drain"
    )

    ledger = rules.drain(ledger, "r1")
    ledger = granted(rules.claim(ledger, wanted("r2", {"a": 90}, after=frozenset({"r1"}))))
    assert ledger.free("a") == 10
    assert isinstance(rules.claim(ledger, wanted("r3", {"a": 11}, after=frozenset({"r1"}))), ReservationRefused), (
        "promised once"
    )
    with pytest.raises(LeaseLost, match="waits for bytes of other pools"):
        rules.activate(ledger, "r2", 1, LATER)
    assert isinstance(rules.adjust(ledger, "r1", 101, 0, {"a": 10}), ReservationRefused), (
        "the bytes of a draining pool do not change"
    )

    ledger = rules.release(ledger, "r1", 1)
    assert ledger.free("a") == 10
    assert rules.activate(ledger, "r2", 1, LATER).reservations["r2"].state is ReservationState.ACTIVE


def test_an_expired_reservation_stays_charged_until_its_process_is_seen_dead(ledger: Ledger) -> None:
    ledger = rules.expire(serving(ledger, "r1", {"a": 80}), LATER + timedelta(seconds=1))

    assert ledger.reservations["r1"].state is ReservationState.SUSPECT
    assert ledger.free("a") == 20
    with pytest.raises(LeaseLost, match="suspect: it cannot be cancelled"):
        rules.cancel(ledger, "r1")
    assert rules.release(ledger, "r1", 1).free("a") == 100


def test_a_suspect_holder_that_renews_is_active_again(ledger: Ledger) -> None:
    ledger = rules.expire(serving(ledger, "r1", {"a": 80}), LATER + timedelta(seconds=1))

    assert rules.renew(ledger, "r1", 101, LATER).reservations["r1"].state is ReservationState.ACTIVE


def test_a_grant_that_no_agent_activates_in_time_is_released(ledger: Ledger) -> None:
    ledger = granted(rules.claim(ledger, wanted("r1", {"a": 80})))

    assert rules.expire(ledger, LATER + timedelta(seconds=1)).reservations == {}


def test_an_old_epoch_can_neither_renew_nor_adjust_nor_release(ledger: Ledger) -> None:
    ledger = serving(ledger, "r1", {"a": 80})
    old: list[Callable[[], object]] = [
        lambda: rules.renew(ledger, "r1", 100, LATER),
        lambda: rules.adjust(ledger, "r1", 100, 0, {"a": 1}),
        lambda: rules.release(ledger, "r1", 0),
        lambda: rules.release(rules.join(ledger, "h", 2, {"a": 100}), "r1", 1),
        lambda: rules.renew(rules.release(ledger, "r1", 1), "r1", 101, LATER),
        lambda: rules.adjust(granted(rules.adjust(ledger, "r1", 101, 0, {"a": 90})), "r1", 101, 0, {"a": 1}),
    ]
    for act in old:
        with pytest.raises(LeaseLost):
            act()


def test_a_holder_grows_only_by_free_bytes(ledger: Ledger) -> None:
    ledger = serving(serving(ledger, "r1", {"a": 50}), "r2", {"a": 30})

    assert granted(rules.adjust(ledger, "r1", 101, 0, {"a": 70})).free("a") == 0
    assert rules.adjust(ledger, "r1", 101, 0, {"a": 71}) == ReservationRefused(
        "needs 71 B of a and has 50 B; 20 B are free"
    )


def test_nothing_is_granted_on_a_lost_host_until_its_agent_joins_again(ledger: Ledger) -> None:
    ledger = rules.declare_host_lost(serving(ledger, "r1", {"a": 80}), "h")

    assert ledger.reservations == {}
    assert isinstance(rules.claim(ledger, wanted("r2", {"a": 1})), ReservationRefused)
    assert isinstance(rules.claim(rules.join(ledger, "h", 2, {"a": 100}), wanted("r2", {"a": 100})), Ledger)


def test_a_device_that_shrinks_or_disappears_keeps_the_capacity_that_is_charged(ledger: Ledger) -> None:
    ledger = rules.join(serving(ledger, "r1", {"a": 80, "b": 70}), "h", 2, {"a": 50})

    assert (ledger.free("a"), ledger.free("b")) == (0, 0)
    assert isinstance(rules.claim(rules.release(ledger, "r1", 2), wanted("r2", {"b": 1})), ReservationRefused), (
        "the device is gone"
    )


def test_reserves_and_pinned_pools_together_cannot_exceed_a_device(ledger: Ledger) -> None:
    """Borrowed bytes come back by preemption, and a pinned pool is never preempted."""
    ledger = granted(rules.add_reserve(ledger, ReservedCapacity("s", "mine", {"a": 60})))
    assert isinstance(rules.claim(ledger, wanted("r1", {"a": 41}, pinned=True)), ReservationRefused)
    assert isinstance(rules.claim(ledger, wanted("r1", {"a": 100})), Ledger), "others may borrow it"
    assert isinstance(rules.claim(ledger, wanted("r1", {"a": 100}, pinned=True, configuration="mine")), Ledger)
    assert isinstance(rules.add_reserve(ledger, ReservedCapacity("t", "other", {"a": 41})), ReservationRefused)


def test_a_quota_counts_the_bytes_that_a_namespace_holds(ledger: Ledger) -> None:
    ledger = replace(ledger, quotas={"team": Quota(max_bytes=100)})
    ledger = serving(ledger, "r1", {"a": 60}, namespace="team")

    assert isinstance(rules.claim(ledger, wanted("r2", {"b": 41}, namespace="team")), ReservationRefused)
    assert isinstance(rules.claim(ledger, wanted("r2", {"b": 41})), Ledger), "other namespaces are not limited by it"
    assert isinstance(rules.adjust(ledger, "r1", 101, 0, {"a": 100}), Ledger)
    assert rules.release(ledger, "r1", 1).quotas["team"].held_bytes == 0
    over = replace(ledger, quotas={"team": Quota(exhausted_until=LATER)})
    assert isinstance(rules.claim(over, wanted("r2", {"b": 1}, namespace="team")), ReservationRefused)


#: Bytes of the hardware. An agent may declare less.
PHYSICAL = {"a": 100, "b": 100, "c": 80}
HOSTS = {"h": ("a", "b"), "i": ("c",)}
SIZES = st.integers(min_value=10, max_value=70)


@dataclass
class Process:
    """A simulated process: the bytes that it believes it may use, and uses."""

    id: str
    host: str
    epoch: int
    bytes: dict[str, int]
    revision: int = 0
    alive: bool = True


class World:
    """A ledger, and simulated agents and processes that do not depend on its correctness."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.now = NOW
        self.count = 0
        self.processes: dict[str, Process] = {}
        #: Messages on their way: delivered late, in any order, twice, or never.
        self.late: list[Callable[[], object]] = []
        #: Epoch of the agent that lives on a host, if one does.
        self.agents: dict[str, int] = {}
        self.ledger = replace(Ledger(), quotas={"team": Quota(max_bytes=120)})
        self.gone: set[str] = set()
        for host in HOSTS:
            self.agent_joins(host, PHYSICAL)

    def one_of(self, choices: Sequence[T]) -> T:
        return self.data.draw(st.sampled_from(choices))

    def number(self) -> int:
        self.count += 1
        return self.count

    def lease(self) -> datetime:
        return self.now + timedelta(seconds=20)

    def moves(self, ledger: Ledger) -> None:
        self.gone |= self.ledger.reservations.keys() - ledger.reservations.keys()
        assert not self.gone & ledger.reservations.keys(), "a released reservation never comes back"
        self.ledger = ledger

    def tries(self, act: Callable[[], Ledger | ReservationRefused]) -> bool:
        try:
            result = act()
        except LeaseLost:
            return False
        if isinstance(result, Ledger):
            self.moves(result)
        return isinstance(result, Ledger)

    def held(self, *states: ReservationState) -> list[str]:
        return sorted(
            id_ for id_, one in self.ledger.reservations.items() if one.state in (states or tuple(ReservationState))
        )

    def living(self) -> list[Process]:
        return [process for process in self.processes.values() if process.alive]

    def plan_claims(self) -> None:
        host = self.one_of("hhi")
        sizes = self.data.draw(st.dictionaries(st.sampled_from(HOSTS[host]), SIZES, min_size=1))
        victims = frozenset(self.data.draw(st.lists(st.sampled_from(self.held()), max_size=3)) if self.held() else ())
        if self.one_of([True, True, False]):
            for id_ in victims:
                self.tries(lambda id_=id_: rules.drain(self.ledger, id_))  # type: ignore[misc] # mypy does not infer a lambda with a default
        epoch, pinned, team = self.number(), self.one_of([False, True]), self.one_of(["", "", "team"])
        one = ReservationRequest(
            f"r{epoch}", epoch, host, "m" if pinned else "n", sizes, self.lease(), victims, pinned, team
        )
        if self.tries(lambda: rules.claim(self.ledger, one)) and self.one_of([True, False]):
            self.starts(one.id, dies=False)

    def plan_adds_or_drops_a_reserve(self) -> None:
        if self.ledger.reserves and self.one_of([True, False]):
            self.moves(rules.drop_reserve(self.ledger, self.one_of(sorted(self.ledger.reserves))))
        else:
            one = ReservedCapacity(f"s{self.number()}", self.one_of("mn"), {self.one_of("aab"): self.data.draw(SIZES)})
            self.tries(lambda: rules.add_reserve(self.ledger, one))

    def plan_stops(self) -> None:
        if self.held():
            id_ = self.one_of(self.held())
            act = self.one_of([rules.cancel, rules.drain])
            self.tries(lambda: act(self.ledger, id_))

    def agent_starts(self) -> None:
        if self.held(ReservationState.HELD):
            self.starts(self.one_of(self.held(ReservationState.HELD)), dies=self.one_of([False, False, False, True]))

    def starts(self, id_: str, *, dies: bool) -> None:
        """Activate the bytes, then start the process; an agent that dies in between leaves bytes without a process."""
        one = self.ledger.reservations[id_]
        agent = self.agents.get(one.host)
        if agent is None or not self.tries(lambda: rules.activate(self.ledger, one.id, agent, self.lease())):
            return
        if dies:
            del self.agents[one.host]
        else:
            self.processes[one.id] = Process(one.id, one.host, one.epoch, dict(one.bytes))

    def agent_joins(self, host: str, declared: Mapping[str, int]) -> None:
        """The agent adopts the processes that the ledger knows, ends the others, and only then joins."""
        for process in self.living():
            one = self.ledger.reservations.get(process.id)
            if process.host == host and (one is None or one.epoch != process.epoch):
                process.alive = False
        epoch = self.agents[host] = self.number()
        self.moves(rules.join(self.ledger, host, epoch, {d: declared[d] for d in HOSTS[host] if d in declared}))

    def agent_joins_again(self) -> None:
        """An agent joins: of a lost host, after its death, or for no reason; devices may have shrunk or disappeared."""
        away = [host for host in HOSTS if host not in self.agents or host not in self.ledger.agents]
        kept = self.one_of([1.0, 1.0, 1.0, 0.5, 0.0])
        declared = {device: int(size * kept) for device, size in PHYSICAL.items() if kept}
        self.agent_joins(self.one_of(away or sorted(HOSTS)), declared)

    def agent_sees_a_process_dead(self) -> None:
        if not self.held(ReservationState.ACTIVE, ReservationState.SUSPECT):
            return
        one = self.ledger.reservations[self.one_of(self.held(ReservationState.ACTIVE, ReservationState.SUSPECT))]
        process, agent = self.processes.get(one.id), self.agents.get(one.host)
        if process is not None and self.one_of([True, False]):
            process.alive = False
        if agent is not None and (process is None or not process.alive):
            self.sends(lambda: self.tries(lambda: rules.release(self.ledger, one.id, agent)))

    def process_renews(self) -> None:
        if self.living():
            process = self.one_of(self.living())
            self.sends(lambda: self.tries(lambda: rules.renew(self.ledger, process.id, process.epoch, self.lease())))

    def process_adjusts(self) -> None:
        """A process frees bytes before it requests fewer, and uses more only after the reply."""
        if not self.living():
            return
        process, replied = self.one_of(self.living()), self.one_of([True, True, False])
        new = {device: self.data.draw(SIZES) for device in process.bytes}
        revision = process.revision
        process.bytes = {device: min(size, new[device]) for device, size in process.bytes.items()}

        def arrives() -> None:
            done = self.tries(lambda: rules.adjust(self.ledger, process.id, process.epoch, revision, new))
            if done and replied and process.revision == revision:
                process.bytes, process.revision = dict(new), revision + 1

        self.sends(arrives)

    def sends(self, message: Callable[[], object]) -> None:
        if self.one_of([True, False]):
            message()
        if self.one_of([True, False]):
            self.late.append(message)

    def late_message_arrives(self) -> None:
        if self.late:
            self.late.pop(self.data.draw(st.integers(0, len(self.late) - 1)))()

    def stale_epochs_try(self) -> None:
        if not self.held():
            return
        one = self.ledger.reservations[self.one_of(self.held())]
        agent = self.ledger.agents.get(one.host, 0)
        for act in (
            lambda: rules.renew(self.ledger, one.id, one.epoch - 1, self.lease()),
            lambda: rules.adjust(self.ledger, one.id, one.epoch - 1, one.revision, one.bytes),
            lambda: rules.adjust(self.ledger, one.id, one.epoch, one.revision + 1, one.bytes),
            lambda: rules.release(self.ledger, one.id, agent - 1),
            lambda: rules.activate(self.ledger, one.id, agent - 1, self.lease()),
        ):
            assert not self.tries(act)

    def time_passes(self) -> None:
        self.now += timedelta(seconds=self.data.draw(st.integers(1, 15)))
        self.moves(rules.expire(self.ledger, self.now))

    def host_is_declared_lost(self) -> None:
        """Its agent and processes may be alive behind a network partition; their epochs are stale."""
        self.moves(rules.declare_host_lost(self.ledger, self.one_of(sorted(HOSTS))))

    def check(self) -> None:
        assert rules.problems(self.ledger) == []
        one_by_one = {id_: (self.ledger.charged(id_), self.ledger.non_preemptible(id_)) for id_ in self.ledger.devices}
        assert self.ledger.sums() == one_by_one
        for device, size in PHYSICAL.items():
            touched = sum(process.bytes.get(device, 0) for process in self.living())
            assert touched <= size, f"{touched} of {size} bytes of {device} are used"
        for process in self.living():
            if process.host in self.ledger.agents:
                one = self.ledger.reservations.get(process.id)
                assert one is not None, f"{process.id} is alive without a reservation"
                assert all(size <= one.bytes[device] for device, size in process.bytes.items())
        held = sum(one.total_bytes for one in self.ledger.reservations.values() if one.namespace == "team")
        assert self.ledger.quotas["team"].held_bytes == held <= 120


#: The events of a history, with their weights.
ACTS: Mapping[Callable[[World], None], int] = {
    World.plan_claims: 8,
    World.plan_stops: 1,
    World.plan_adds_or_drops_a_reserve: 1,
    World.agent_starts: 4,
    World.agent_sees_a_process_dead: 4,
    World.agent_joins_again: 2,
    World.process_renews: 2,
    World.process_adjusts: 4,
    World.late_message_arrives: 3,
    World.stale_epochs_try: 1,
    World.time_passes: 2,
    World.host_is_declared_lost: 1,
}
_WEIGHTED = [act for act, weight in ACTS.items() for _ in range(weight)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_in_no_history_two_processes_use_the_same_byte(data: st.DataObject) -> None:
    """Histories of plans, crashes, expiries, late messages, adoptions and lost hosts."""
    world = World(data)
    for _ in range(60):
        data.draw(st.sampled_from(_WEIGHTED))(world)
        world.check()

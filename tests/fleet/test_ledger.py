"""The ledger: what it grants and refuses, and random histories against a world of processes that touch the bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from app.fleet import ledger as books
from app.fleet.fleet import SetAside
from app.fleet.reservation import TRANSITIONS, Act, Claim, Ledger, Quota, Refused, State
from app.kernel.errors import LeaseLost

NOW = datetime(2030, 1, 1, tzinfo=UTC)
LATER = NOW + timedelta(minutes=1)


def granted(result: Ledger | Refused) -> Ledger:
    assert isinstance(result, Ledger), result
    return result


def wanted(id_: str, bytes_: Mapping[str, int], **more: object) -> Claim:
    made = Claim(
        id_, epoch=int(id_.strip("r") or 0) + 100, host="h", configuration="m", bytes=bytes_, lease_until=LATER
    )
    return replace(made, **more)  # type: ignore[arg-type]


@pytest.fixture
def ledger() -> Ledger:
    return books.join(Ledger(), "h", 1, {"a": 100, "b": 100})


def serving(ledger: Ledger, id_: str, bytes_: Mapping[str, int], **more: object) -> Ledger:
    return books.activate(granted(books.claim(ledger, wanted(id_, bytes_, **more))), id_, 1, LATER)


def test_a_claim_is_granted_on_all_its_devices_or_refused_with_the_figures(ledger: Ledger) -> None:
    ledger = granted(books.claim(ledger, wanted("r1", {"a": 60, "b": 10})))
    assert (ledger.free("a"), ledger.free("b")) == (40, 90)

    assert books.claim(ledger, wanted("r2", {"b": 50, "a": 50})) == Refused("needs 50 B of a, which has 40 B free")


@pytest.mark.parametrize(
    ("claim", "why"),
    [
        (wanted("r1", {}), "at least one device"),
        (wanted("r1", {"a": 0}), "bytes of each"),
        (wanted("r1", {"a": 1, "x": 1}), "no device x on host h"),
        (wanted("r1", {"a": 1}, host="elsewhere"), "no device a on host elsewhere"),
    ],
)
def test_a_claim_that_makes_no_sense_is_refused(ledger: Ledger, claim: Claim, why: str) -> None:
    refused = books.claim(ledger, claim)
    assert isinstance(refused, Refused)
    assert why in refused.reason


def test_bytes_of_a_victim_pass_to_the_claim_that_waits_for_them_and_to_nobody_else(ledger: Ledger) -> None:
    ledger = serving(ledger, "r1", {"a": 80})
    assert isinstance(books.claim(ledger, wanted("r2", {"a": 90}, after=frozenset({"r1"}))), Refused), (
        "it does not drain"
    )

    ledger = books.drain(ledger, "r1")
    ledger = granted(books.claim(ledger, wanted("r2", {"a": 90}, after=frozenset({"r1"}))))
    assert ledger.free("a") == 10
    assert isinstance(books.claim(ledger, wanted("r3", {"a": 11}, after=frozenset({"r1"}))), Refused), "promised once"
    with pytest.raises(LeaseLost, match="waits for the bytes of others"):
        books.activate(ledger, "r2", 1, LATER)
    assert isinstance(books.adjust(ledger, "r1", 101, 0, {"a": 10}), Refused), "what drains stays as it is"

    ledger = books.release(ledger, "r1", 1)
    assert ledger.free("a") == 10
    assert books.activate(ledger, "r2", 1, LATER).reservations["r2"].state is State.ACTIVE


def test_a_lease_that_ran_out_stays_charged_until_the_process_is_known_dead(ledger: Ledger) -> None:
    ledger = books.expire(serving(ledger, "r1", {"a": 80}), LATER + timedelta(seconds=1))

    assert ledger.reservations["r1"].state is State.SUSPECT
    assert ledger.free("a") == 20
    with pytest.raises(LeaseLost, match="suspect: it cannot be cancelled"):
        books.cancel(ledger, "r1")
    assert books.release(ledger, "r1", 1).free("a") == 100


def test_a_holder_that_turns_out_to_live_goes_on(ledger: Ledger) -> None:
    ledger = books.expire(serving(ledger, "r1", {"a": 80}), LATER + timedelta(seconds=1))

    assert books.renew(ledger, "r1", 101, LATER).reservations["r1"].state is State.ACTIVE


def test_what_no_agent_took_in_time_is_given_back(ledger: Ledger) -> None:
    ledger = granted(books.claim(ledger, wanted("r1", {"a": 80})))

    assert books.expire(ledger, LATER + timedelta(seconds=1)).reservations == {}


def test_an_old_epoch_can_neither_renew_nor_adjust_nor_release(ledger: Ledger) -> None:
    ledger = serving(ledger, "r1", {"a": 80})
    old: list[Callable[[], object]] = [
        lambda: books.renew(ledger, "r1", 100, LATER),
        lambda: books.adjust(ledger, "r1", 100, 0, {"a": 1}),
        lambda: books.release(ledger, "r1", 0),
        lambda: books.release(books.join(ledger, "h", 2, {"a": 100}), "r1", 1),
        lambda: books.renew(books.release(ledger, "r1", 1), "r1", 101, LATER),
        lambda: books.adjust(granted(books.adjust(ledger, "r1", 101, 0, {"a": 90})), "r1", 101, 0, {"a": 1}),
    ]
    for act in old:
        with pytest.raises(LeaseLost):
            act()


def test_a_holder_grows_only_into_what_is_free(ledger: Ledger) -> None:
    ledger = serving(serving(ledger, "r1", {"a": 50}), "r2", {"a": 30})

    assert granted(books.adjust(ledger, "r1", 101, 0, {"a": 70})).free("a") == 0
    assert books.adjust(ledger, "r1", 101, 0, {"a": 71}) == Refused("needs 71 B of a and has 50 B; 20 B are free")


def test_a_lost_host_is_out_until_its_agent_joins_anew(ledger: Ledger) -> None:
    ledger = books.lose(serving(ledger, "r1", {"a": 80}), "h")

    assert ledger.reservations == {}
    assert isinstance(books.claim(ledger, wanted("r2", {"a": 1})), Refused)
    assert isinstance(books.claim(books.join(ledger, "h", 2, {"a": 100}), wanted("r2", {"a": 100})), Ledger)


def test_a_device_that_shrinks_or_goes_stays_as_large_as_what_it_holds(ledger: Ledger) -> None:
    ledger = books.join(serving(ledger, "r1", {"a": 80, "b": 70}), "h", 2, {"a": 50})

    assert (ledger.free("a"), ledger.free("b")) == (0, 0)
    assert isinstance(books.claim(books.release(ledger, "r1", 2), wanted("r2", {"b": 1})), Refused), "it is gone"


def test_reserves_and_pinned_pools_cannot_pass_a_device_together(ledger: Ledger) -> None:
    """What is lent comes back by preemption: a pinned pool on it would never give it back."""
    ledger = granted(books.set_aside(ledger, SetAside("s", "mine", {"a": 60})))
    assert isinstance(books.claim(ledger, wanted("r1", {"a": 41}, pinned=True)), Refused)
    assert isinstance(books.claim(ledger, wanted("r1", {"a": 100})), Ledger), "it is lent"
    assert isinstance(books.claim(ledger, wanted("r1", {"a": 100}, pinned=True, configuration="mine")), Ledger)
    assert isinstance(books.set_aside(ledger, SetAside("t", "other", {"a": 41})), Refused)


def test_a_quota_counts_what_a_namespace_holds(ledger: Ledger) -> None:
    ledger = replace(ledger, quotas={"team": Quota(max_bytes=100)})
    ledger = serving(ledger, "r1", {"a": 60}, namespace="team")

    assert isinstance(books.claim(ledger, wanted("r2", {"b": 41}, namespace="team")), Refused)
    assert isinstance(books.claim(ledger, wanted("r2", {"b": 41})), Ledger), "others have their own"
    assert isinstance(books.adjust(ledger, "r1", 101, 0, {"a": 100}), Ledger)
    assert books.release(ledger, "r1", 1).quotas["team"].held_bytes == 0
    over = replace(ledger, quotas={"team": Quota(exhausted_until=LATER)})
    assert isinstance(books.claim(over, wanted("r2", {"b": 1}, namespace="team")), Refused)


def test_no_edge_leads_back_from_released() -> None:
    assert not [state for state, _ in TRANSITIONS if state is State.RELEASED]
    assert {act for _, act in TRANSITIONS} == set(Act)


#: What the hardware has. An agent may declare less of it.
PHYSICAL = {"a": 100, "b": 100, "c": 80}
HOSTS = {"h": ("a", "b"), "i": ("c",)}
SIZES = st.integers(min_value=10, max_value=100)


@dataclass
class Process:
    """A process in the world: what it believes it may touch, and touches."""

    id: str
    host: str
    epoch: int
    bytes: dict[str, int]
    revision: int = 0
    alive: bool = True


class Histories(RuleBasedStateMachine):
    """Plans, crashes, expiries, late messages, adoptions, lost hosts: no byte is ever in two hands."""

    @initialize()
    def begin(self) -> None:
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
            self.agent_begins(host, PHYSICAL)

    def number(self) -> int:
        self.count += 1
        return self.count

    def lease(self) -> datetime:
        return self.now + timedelta(seconds=10)

    def moves(self, ledger: Ledger) -> None:
        self.gone |= self.ledger.reservations.keys() - ledger.reservations.keys()
        assert not self.gone & ledger.reservations.keys(), "what was given back never comes back"
        self.ledger = ledger

    def tries(self, act: Callable[[], Ledger | Refused]) -> bool:
        try:
            result = act()
        except LeaseLost:
            return False
        if isinstance(result, Ledger):
            self.moves(result)
        return isinstance(result, Ledger)

    def held(self, *states: State) -> list[str]:
        return sorted(id_ for id_, one in self.ledger.reservations.items() if one.state in states)

    def living(self) -> list[Process]:
        return [process for process in self.processes.values() if process.alive]

    @rule(data=st.data(), host=st.sampled_from("hhi"), pinned=st.booleans(), team=st.sampled_from(["", "", "team"]))
    def plan_claims(self, data: st.DataObject, host: str, pinned: bool, team: str) -> None:
        sizes = data.draw(st.dictionaries(st.sampled_from(HOSTS[host]), SIZES, min_size=1), label="sizes")
        known = self.held(State.ACTIVE, State.SUSPECT, State.HELD)
        victims = data.draw(st.frozensets(st.sampled_from(known), max_size=3) if known else st.just(frozenset()))
        if data.draw(st.sampled_from([True, True, False]), label="drains them"):
            for id_ in victims:
                self.tries(lambda id_=id_: books.drain(self.ledger, id_))  # type: ignore[misc]
        epoch = self.number()
        one = Claim(f"r{epoch}", epoch, host, "m" if pinned else "n", sizes, self.lease(), victims, pinned, team)
        if self.tries(lambda: books.claim(self.ledger, one)) and data.draw(st.booleans(), label="started at once"):
            self.starts(one.id, dies=False)

    @rule(data=st.data(), device=st.sampled_from("aab"), owner=st.sampled_from("mn"), size=SIZES)
    def plan_sets_aside_or_drops(self, data: st.DataObject, device: str, owner: str, size: int) -> None:
        if self.ledger.reserves and data.draw(st.booleans()):
            self.moves(books.drop_reserve(self.ledger, data.draw(st.sampled_from(sorted(self.ledger.reserves)))))
        else:
            one = SetAside(f"s{self.number()}", owner, {device: size})
            self.tries(lambda: books.set_aside(self.ledger, one))

    @precondition(lambda self: self.ledger.reservations)
    @rule(data=st.data(), cancels=st.booleans())
    def plan_stops(self, data: st.DataObject, cancels: bool) -> None:
        id_ = data.draw(st.sampled_from(sorted(self.ledger.reservations)))
        self.tries(lambda: books.cancel(self.ledger, id_) if cancels else books.drain(self.ledger, id_))

    @precondition(lambda self: self.held(State.HELD))
    @rule(data=st.data(), dies=st.sampled_from([False, False, True]))
    def agent_starts(self, data: st.DataObject, dies: bool) -> None:
        """Bytes first, process second; an agent that dies between leaves bytes without a process."""
        self.starts(data.draw(st.sampled_from(self.held(State.HELD))), dies=dies)

    def starts(self, id_: str, *, dies: bool) -> None:
        one = self.ledger.reservations[id_]
        agent = self.agents.get(one.host)
        if agent is None or not self.tries(lambda: books.activate(self.ledger, one.id, agent, self.lease())):
            return
        if dies:
            del self.agents[one.host]  # until the next one begins
        else:
            self.processes[one.id] = Process(one.id, one.host, one.epoch, dict(one.bytes))

    def agent_begins(self, host: str, declared: Mapping[str, int]) -> None:
        """It adopts what the ledger holds, ends everything else, and only then speaks for the host."""
        for process in self.living():
            one = self.ledger.reservations.get(process.id)
            if process.host == host and (one is None or one.epoch != process.epoch):
                process.alive = False
        epoch = self.agents[host] = self.number()
        self.moves(books.join(self.ledger, host, epoch, {d: declared[d] for d in HOSTS[host] if d in declared}))

    @rule(data=st.data(), host=st.sampled_from(sorted(HOSTS)))
    def agent_begins_anew(self, data: st.DataObject, host: str) -> None:
        kept = data.draw(st.sampled_from([1.0, 1.0, 1.0, 0.5, 0.0]), label="part of each device that it declares")
        self.agent_begins(host, {device: int(size * kept) for device, size in PHYSICAL.items() if kept})

    @precondition(lambda self: self.held(State.ACTIVE, State.SUSPECT))
    @rule(data=st.data(), dies=st.booleans())
    def agent_sees_a_process_dead(self, data: st.DataObject, dies: bool) -> None:
        one = self.ledger.reservations[data.draw(st.sampled_from(self.held(State.ACTIVE, State.SUSPECT)))]
        process, agent = self.processes.get(one.id), self.agents.get(one.host)
        if process is not None and dies:
            process.alive = False
        if agent is not None and (process is None or not process.alive):
            self.late.append(lambda: self.tries(lambda: books.release(self.ledger, one.id, agent)))

    @precondition(lambda self: self.living())
    @rule(data=st.data())
    def process_renews(self, data: st.DataObject) -> None:
        process = data.draw(st.sampled_from(self.living()))
        self.late.append(lambda: self.tries(lambda: books.renew(self.ledger, process.id, process.epoch, self.lease())))

    @precondition(lambda self: self.living())
    @rule(data=st.data(), heard=st.sampled_from([True, True, False]))
    def process_adjusts(self, data: st.DataObject, heard: bool) -> None:
        """It lets go before it asks for less, and takes more only when it has heard yes."""
        process = data.draw(st.sampled_from(self.living()))
        new = {device: data.draw(SIZES) for device in process.bytes}
        revision = process.revision
        process.bytes = {device: min(size, new[device]) for device, size in process.bytes.items()}

        def arrives() -> None:
            done = self.tries(lambda: books.adjust(self.ledger, process.id, process.epoch, revision, new))
            if done and heard and process.revision == revision:
                process.bytes, process.revision = dict(new), revision + 1

        self.late.append(arrives)
        if data.draw(st.booleans(), label="arrives at once"):
            self.late.pop()()

    @precondition(lambda self: self.late)
    @rule(data=st.data(), again=st.sampled_from([False, False, True]))
    def message_arrives(self, data: st.DataObject, again: bool) -> None:
        index = data.draw(st.integers(0, len(self.late) - 1))
        message = self.late[index] if again else self.late.pop(index)
        message()

    @precondition(lambda self: self.ledger.reservations)
    @rule(data=st.data())
    def nobody_who_is_old_can_do_anything(self, data: st.DataObject) -> None:
        one = self.ledger.reservations[data.draw(st.sampled_from(sorted(self.ledger.reservations)))]
        agent = self.ledger.agents.get(one.host, 0)
        for act in (
            lambda: books.renew(self.ledger, one.id, one.epoch - 1, self.lease()),
            lambda: books.adjust(self.ledger, one.id, one.epoch - 1, one.revision, one.bytes),
            lambda: books.adjust(self.ledger, one.id, one.epoch, one.revision + 1, one.bytes),
            lambda: books.release(self.ledger, one.id, agent - 1),
            lambda: books.activate(self.ledger, one.id, agent - 1, self.lease()),
        ):
            assert not self.tries(act)

    @rule(seconds=st.integers(1, 15))
    def time_passes(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)
        self.moves(books.expire(self.ledger, self.now))

    @rule(host=st.sampled_from(sorted(HOSTS)), really=st.sampled_from([False, False, False, True]))
    def host_is_declared_lost(self, host: str, really: bool) -> None:
        """Its agent and its processes may live on, cut off: they have no say."""
        if really:
            self.moves(books.lose(self.ledger, host))

    @invariant()
    def the_ledger_keeps_its_promises(self) -> None:
        assert books.problems(self.ledger) == []

    @invariant()
    def no_byte_is_in_two_hands(self) -> None:
        for device, size in PHYSICAL.items():
            touched = sum(process.bytes.get(device, 0) for process in self.living())
            assert touched <= size, f"{touched} of {size} bytes of {device} are touched"

    @invariant()
    def a_living_process_is_charged_or_its_host_is_out(self) -> None:
        for process in self.living():
            if process.host in self.ledger.agents:
                one = self.ledger.reservations.get(process.id)
                assert one is not None, f"{process.id} lives and is charged nowhere"
                assert all(size <= one.bytes[device] for device, size in process.bytes.items())

    @invariant()
    def quotas_count_what_is_held(self) -> None:
        held = sum(one.total_bytes for one in self.ledger.reservations.values() if one.namespace == "team")
        assert self.ledger.quotas["team"].held_bytes == held <= 120


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)

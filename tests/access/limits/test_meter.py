"""The meter of calls, on a real Valkey: several limits at once, and tokens that come back."""

from __future__ import annotations

import pytest
import redis

from app.access.limits.limits import CallLimits, LimitName, LimitReached, LimitSubject, SubjectKind, effective
from app.access.limits.limits import LimitOverride as Override
from app.access.limits.meter import MeteredCall, renewal
from app.kernel.errors import BrokerUnreachable
from app.kernel.sections.access import LimitSettings

TEAM = LimitSubject(SubjectKind.NAMESPACE, "team")


def admit(valkey: redis.Redis, key: str, limits: CallLimits, of_team: CallLimits, id_: str = "a") -> dict[str, int]:
    """Admit a call; what is left of each limit."""
    every = [(LimitSubject(SubjectKind.KEY, key), limits), (TEAM, of_team)]
    call = MeteredCall.of(id_, every, "interactive", is_held=True)
    return {f"{one.subject.id}-{one.name}": one.remaining for one in call.standings(valkey.eval(*call.admission()))}


def test_a_key_has_limits_of_its_own_under_those_of_its_namespace(valkey: redis.Redis) -> None:
    """A refused request uses nothing of any limit."""
    one, team = CallLimits(requests_per_minute=1), CallLimits(requests_per_minute=3)
    assert admit(valkey, "k1", one, team) == {"k1-requests": 0, "team-requests": 2}
    for _ in range(5):
        with pytest.raises(LimitReached, match="key 'k1'"):
            admit(valkey, "k1", one, team)
    assert admit(valkey, "k2", one, team) == {"k2-requests": 0, "team-requests": 1}
    assert admit(valkey, "k3", one, team) == {"k3-requests": 0, "team-requests": 0}
    with pytest.raises(LimitReached, match="namespace 'team'"):
        admit(valkey, "k4", one, team)
    assert valkey.get("arriero:limits:key:k4:requests") is None


def test_requests_come_back_evenly(valkey: redis.Redis) -> None:
    """60000 in a minute are one each millisecond."""
    many = CallLimits(requests_per_minute=60_000)
    now = int(valkey.time()[0]) * 1000
    valkey.set("arriero:limits:key:k:requests", now + 70_000)
    with pytest.raises(LimitReached) as caught:
        admit(valkey, "k", many, CallLimits())
    assert 8 <= caught.value.standing.retry_after <= 10.1
    valkey.set("arriero:limits:key:k:requests", now + 30_000)
    assert 29_000 <= admit(valkey, "k", many, CallLimits())["k-requests"] <= 31_100


def test_the_answers_of_a_burst_are_charged_and_overdraw_the_minute(valkey: redis.Redis) -> None:
    limits = CallLimits(tokens_per_minute=600)
    call = MeteredCall.of("a", [(TEAM, limits)], "batch", is_held=True)
    for _ in range(2):
        call.standings(valkey.eval(*call.admission()))
    for _ in range(2):
        charge = call.charge(600)
        assert charge is not None
        valkey.eval(*charge)
    with pytest.raises(LimitReached) as caught:
        call.standings(valkey.eval(*call.admission()))
    assert 59 <= caught.value.standing.retry_after <= 60.2
    assert caught.value.standing.name is LimitName.TOKENS
    assert call.charge(0) is None


def test_a_renewed_call_is_held_and_an_ended_one_does_not_come_back(valkey: redis.Redis) -> None:
    one = CallLimits(concurrent_calls=1)
    admit(valkey, "k", one, CallLimits(), "call-1")
    key = "arriero:limits:key:k:concurrent"
    before = valkey.zscore(key, "call-1")
    valkey.zadd(key, {"call-1": 5})
    valkey.eval(*renewal([(key, "call-1"), (key, "ended")]))
    assert (valkey.zscore(key, "call-1"), valkey.zscore(key, "ended")) >= (before, None)
    assert valkey.zcard(key) == 1
    assert 60_000 < valkey.pttl(key) <= 120_000


@pytest.mark.parametrize("answer", [None, 1, [], [1, [[1]]], [1, []], [1, [["x", "y", "z"]]]])
def test_an_answer_of_another_form_is_no_answer(answer: object) -> None:
    call = MeteredCall.of("a", [(TEAM, CallLimits(requests_per_minute=1))], "", is_held=False)
    with pytest.raises(BrokerUnreachable):
        call.standings(answer)


def test_garbage_in_a_counter_counts_as_nothing(valkey: redis.Redis) -> None:
    valkey.set("arriero:limits:key:k:requests", "not a number")
    assert admit(valkey, "k", CallLimits(requests_per_minute=2), CallLimits()) == {"k-requests": 1}


def test_what_was_set_for_one_holds_over_the_settings() -> None:
    defaults = LimitSettings(key_requests_per_minute=5, key_concurrent_calls=2)
    found = effective(SubjectKind.KEY, defaults, Override(requests_per_minute=0, tokens_per_minute=9))
    assert found == CallLimits(0, 9, 2, 0, 0)
    assert effective(SubjectKind.NAMESPACE, defaults, None).is_unlimited

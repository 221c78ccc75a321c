"""API keys: their form, and what makes one valid."""

from __future__ import annotations

import hashlib
import hmac
from datetime import timedelta
from typing import Any

import pytest

from app.access import keys
from app.access.callers import LOCAL, Caller, KeyScope
from app.access.keys import NewKey, StoredSecrets
from app.kernel import ids
from app.kernel.errors import InvalidInput

ID, SECRET = "k3v9x2m8qa", "s" * keys.SECRET_CHARACTERS
KEY = keys.compose(ID, SECRET)
OTHER = keys.compose(ID, "t" * keys.SECRET_CHARACTERS)


def stored(**fields: Any) -> StoredSecrets:
    values = {
        "caller": Caller("k", None, frozenset(KeyScope), ID),
        "current": keys.hash_of(KEY),
        "previous": None,
        "revoked": False,
        "expires_in": None,
        "overlap_ends_in": None,
        "used_ago": None,
        "previous_used_ago": None,
    }
    return StoredSecrets(**(values | fields))


def test_a_key_has_256_random_bits_and_is_stored_as_its_sha256() -> None:
    made = {ids.new_text(keys.SECRET_CHARACTERS) for _ in range(100)}

    assert 62**keys.SECRET_CHARACTERS >= 2**256
    assert len(made) == 100
    assert all(one.isalnum() and one.isascii() for one in made)
    assert keys.hash_of(KEY) == hashlib.sha256(KEY.encode()).digest()


@pytest.mark.parametrize(
    "text",
    ["", "arr_", KEY[:-1], KEY + "s", KEY.replace("arr_", "ARR_"), KEY + "\n", KEY.replace("s", "ß", 1), f" {KEY}", ID],
)
def test_what_has_not_the_form_of_a_key_has_no_id(text: str) -> None:
    assert keys.id_of(KEY) == ID
    assert keys.id_of(text) is None


@pytest.mark.parametrize(
    ("fields", "key", "age", "valid"),
    [
        ({}, KEY, 5, True),
        ({}, OTHER, 0, False),
        ({"revoked": True}, KEY, 0, False),
        ({"expires_in": 2.0}, KEY, 1.9, True),
        ({"expires_in": 2.0}, KEY, 2.0, False),
        ({"expires_in": -1.0}, KEY, 0, False),
        ({"previous": keys.hash_of(OTHER), "overlap_ends_in": 2.0}, OTHER, 1.9, True),
        ({"previous": keys.hash_of(OTHER), "overlap_ends_in": 2.0}, OTHER, 2.0, False),
        ({"previous": keys.hash_of(OTHER), "overlap_ends_in": None}, OTHER, 0, False),
        ({"previous": keys.hash_of(OTHER), "overlap_ends_in": 2.0, "expires_in": 1.0}, OTHER, 1.0, False),
        ({"previous": keys.hash_of(OTHER), "overlap_ends_in": -1.0}, KEY, 0, True),
    ],
)
def test_when_a_key_is_valid(fields: dict[str, Any], key: str, age: float, *, valid: bool) -> None:
    verdict = keys.verify(keys.hash_of(key), stored(**fields), age)

    assert (verdict.refusal is None) is valid
    assert verdict.is_previous is (valid and key == OTHER)


def test_an_unknown_id_takes_the_comparisons_of_a_known_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or compare(a, b))

    for one in (None, stored(), stored(revoked=True)):
        assert keys.verify(keys.hash_of(OTHER), one, 0).refusal == keys.UNKNOWN
    assert compared == [(32, 32)] * 6
    # The hash that stands for the missing one is nobody's.
    assert keys.verify(bytes(32), None, 0).refusal == keys.UNKNOWN
    assert keys.verify(bytes(32), stored(), 0).refusal == keys.UNKNOWN


def test_nobody_gives_a_key_more_than_they_have() -> None:
    limited = Caller("ops", "a", frozenset({KeyScope.ADMIN, KeyScope.READ}))
    read, day = frozenset({KeyScope.READ}), timedelta(days=1)

    assert NewKey.by(limited, "k", None, read, day) == NewKey("k", "a", read, day)
    assert NewKey.by(LOCAL, "k", None, read, None).namespace is None
    with pytest.raises(InvalidInput) as refused:
        NewKey.by(limited, "", "b", [KeyScope.SUBMIT], timedelta(0))
    assert [problem.where for problem in refused.value.problems] == ["name", "namespace", "expires_in", "scopes"]

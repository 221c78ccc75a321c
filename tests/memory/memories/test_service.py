"""Memories in Postgres: they exist once, never change their text, end, take each other's place, and are forgotten."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from app.kernel import ids
from app.kernel.database import Database
from app.kernel.errors import ArrieroError, Conflict, InvalidInput, NotFound
from app.memory.memories import forgetting, service
from app.memory.memories.kinds import MemoryKind, MemoryOrigin
from app.memory.memories.memory import Memory, MemorySource, NewMemory
from app.memory.memories.store import MemoryFilter
from app.memory.recall.passages import SourceKind
from app.memory.recall.query import RecallQuery
from app.memory.recall.service import Recall

NOW = datetime(2026, 11, 1, tzinfo=UTC)
DAY = timedelta(days=1)


def remember(database: Database, given: str, namespace: str = "a", **fields: object) -> Memory:
    return service.remember(database, NewMemory(given, **fields), namespace, "ana").memory  # type: ignore[arg-type] # fields of several types


def texts_of(database: Database, **of: object) -> list[str]:
    return [one.text for one in service.page(database, MemoryFilter(**of)).memories]  # type: ignore[arg-type] # fields of several types


def test_a_memory_has_its_sources_and_says_who_wrote_it(database: Database) -> None:
    message = ids.new_id()
    source = MemorySource(MemoryOrigin.MESSAGE, "user", ids.new_id(), message)
    made = remember(database, " Ana lives in Zürich. ", user="ana", sources=[source], importance=0.8)

    found = service.get(database, service.shown(made.id), "a")

    assert found == made
    assert (found.text, found.user, found.kind, found.importance) == ("Ana lives in Zürich.", "ana", "fact", 0.8)
    assert found.sources == (source,)
    (entry,) = service.history(database, service.shown(made.id), "a").entries
    assert (entry.event, entry.author) == ("remembered", "ana")


def test_what_is_remembered_twice_exists_once(database: Database) -> None:
    first = service.remember(database, NewMemory("Ana prefers C++"), "a", "ana")
    again = service.remember(database, NewMemory("ana prefers  c++."), "a", "ben")
    other = service.remember(database, NewMemory("Ana prefers C"), "a", "ana")
    of_user = service.remember(database, NewMemory("Ana prefers C++", user="ana"), "a", "ana")

    assert first.created
    assert not again.created
    assert again.memory == first.memory
    assert other.created, "C is not C++"
    assert of_user.created, "a memory of a user is not one of the namespace"


def test_another_namespace_finds_nothing(database: Database) -> None:
    made = service.shown(remember(database, "The door code is 4711", namespace="b").id)

    for act in (
        lambda: service.get(database, made, "a"),
        lambda: service.history(database, made, "a"),
        lambda: service.invalidate(database, made, "a", "ana"),
        lambda: service.supersede(database, made, NewMemory("x"), "a", "ana"),
        lambda: service.mark(database, made, "a", "ana"),
        lambda: forgetting.forget(database, [made], "a"),
        lambda: service.remember(database, NewMemory("x"), "a", "ana", supersedes=made),
        lambda: service.get(database, "mem_nothing", "a"),
    ):
        with pytest.raises(NotFound):
            act()
    assert texts_of(database, namespace="a") == []
    assert texts_of(database, namespace="b") == ["The door code is 4711"]


def test_a_changed_fact_supersedes_the_old_one_which_is_still_read_as_of_then(database: Database) -> None:
    old = remember(database, "Ana lives in Bern", user="ana", valid_from=NOW)
    new = service.supersede(
        database,
        service.shown(old.id),
        NewMemory("Ana lives in Zürich", user="ana", valid_from=NOW + DAY),
        "a",
        "ana",
        note="she moved",
    ).memory

    ended = service.get(database, service.shown(old.id), "a")
    assert (ended.text, ended.invalid_at, ended.superseded_by) == (old.text, NOW + DAY, new.id)
    assert texts_of(database, namespace="a") == ["Ana lives in Zürich"]
    assert texts_of(database, namespace="a", as_of=NOW) == ["Ana lives in Bern"]
    assert texts_of(database, namespace="a", as_of=NOW + DAY) == ["Ana lives in Zürich"]
    assert texts_of(database, namespace="a", as_of=NOW - DAY) == []
    assert len(texts_of(database, namespace="a", all_times=True)) == 2
    past = service.history(database, service.shown(new.id), "a")
    assert [one.id for one in past.memories] == [old.id, new.id]
    assert [(entry.event, entry.note) for entry in past.entries] == [
        ("remembered", ""),
        ("remembered", "she moved"),
        ("superseded", "she moved"),
    ]
    with pytest.raises(Conflict, match="cannot be superseded"):
        service.supersede(database, service.shown(old.id), NewMemory("Ana lives in Basel", user="ana"), "a", "ana")


def test_what_cannot_be_superseded_leaves_nothing_behind(database: Database) -> None:
    old = service.shown(remember(database, "Ana lives in Bern", user="ana", valid_from=NOW).id)

    with pytest.raises(InvalidInput, match="user"):
        service.supersede(database, old, NewMemory("Ben lives in Zürich", user="ben"), "a", "ana")
    early = NewMemory("Ana lives in Chur", user="ana", valid_from=NOW - DAY)
    with pytest.raises(InvalidInput, match="valid_from"):
        service.supersede(database, old, early, "a", "ana")

    assert texts_of(database, namespace="a", all_times=True) == ["Ana lives in Bern"]


def test_opposite_supersessions_at_the_same_time_do_not_deadlock(database: Database) -> None:
    """Each takes the place of the memory whose words the other one has; both are used in a prompt meanwhile."""
    pairs = [tuple(remember(database, f"Tea {n} is {colour}") for colour in ("green", "black")) for n in range(40)]
    together = threading.Barrier(3)
    others: list[ArrieroError] = []
    refused = []

    def supersede(old: int, new: int) -> None:
        for pair in pairs:
            together.wait(60)
            try:
                service.supersede(database, service.shown(pair[old].id), NewMemory(pair[new].text), "a", "ana")
            except Conflict as conflict:
                refused.append(conflict)
            except ArrieroError as error:
                others.append(error)

    def use() -> None:
        for pair in pairs:
            together.wait(60)
            try:
                with database.work() as work:
                    service.note_used_in(work, [service.shown(one.id) for one in reversed(pair)])
            except ArrieroError as error:
                others.append(error)

    threads = [threading.Thread(target=supersede, args=order) for order in ((0, 1), (1, 0))]
    threads.append(threading.Thread(target=use))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert others == []
    assert len(refused) == 2 * len(pairs), "a memory that holds says the same"
    assert len(texts_of(database)) == 2 * len(pairs)


def test_transactions_that_write_the_same_memories_in_different_orders_do_not_deadlock(database: Database) -> None:
    """As two extractions for one user do."""
    words = [f"Tea number {n} is green" for n in range(40)]
    others: list[ArrieroError] = []
    together = threading.Barrier(2)

    def write(given: list[str]) -> None:
        together.wait(60)
        try:
            with database.work() as work:
                for one in given:
                    service.remember_in(work, NewMemory(one, user="ana"), "a", "ana")
        except ArrieroError as error:
            others.append(error)

    threads = [threading.Thread(target=write, args=(given,)) for given in (words, words[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert others == []
    assert sorted(texts_of(database)) == sorted(words)


def test_an_invalid_memory_may_be_remembered_again(database: Database) -> None:
    made = remember(database, "The office is closed")
    ended = service.invalidate(database, service.shown(made.id), "a", "ana", note="it is open")

    assert ended.invalid_at is not None
    assert texts_of(database, namespace="a") == []
    with pytest.raises(Conflict, match="ended at"):
        service.invalidate(database, service.shown(made.id), "a", "ana")
    assert remember(database, "The office is closed").id != made.id


def test_a_memory_is_marked_as_a_breakthrough_and_no_more(database: Database) -> None:
    made = service.shown(remember(database, "Batching halves the cost", kind=MemoryKind.DECISION).id)

    service.mark(database, made, "a", "ana", note="the turning point")
    assert texts_of(database, namespace="a", kind=MemoryKind.BREAKTHROUGH) == ["Batching halves the cost"]
    assert service.mark(database, made, "a", "ana", is_breakthrough=False).kind == "decision"
    own = service.shown(remember(database, "Sleep helps", kind=MemoryKind.BREAKTHROUGH).id)
    with pytest.raises(Conflict, match="remembered as a breakthrough"):
        service.mark(database, own, "a", "ana", is_breakthrough=False)


def test_a_list_is_read_part_by_part_and_by_user(database: Database) -> None:
    made = [remember(database, f"Fact {number}", user="ana" if number % 2 else "ben") for number in range(5)]

    first = service.page(database, MemoryFilter(namespace="a"), limit=2)
    rest = service.page(database, MemoryFilter(namespace="a"), service.shown(first.memories[-1].id), 10)
    newest_first = sorted(made, key=lambda one: one.id, reverse=True)
    assert [*first.memories, *rest.memories] == newest_first
    assert (first.has_more, rest.has_more) == (True, False)
    assert texts_of(database, namespace="a", user="ana") == [one.text for one in newest_first if one.user == "ana"]


def test_forgetting_deletes_for_real_and_shows_it(database: Database) -> None:
    old = remember(database, "Ana lives in Bern", user="ana")
    new = service.supersede(
        database, service.shown(old.id), NewMemory("Ana lives in Zürich", user="ana"), "a", "ana"
    ).memory
    kept = remember(database, "Ana likes tea", user="ana")

    done = forgetting.forget(database, [service.shown(new.id)], "a", with_history=True)

    assert "passages and vectors" in {one.where for one in done.searched}
    assert set(done.ids) == {old.id, new.id}
    assert done.is_proved
    assert [one.found for one in done.searched] == [0] * len(done.searched)
    with database.work() as work:
        rows = work.rows(text("SELECT id FROM memory"))
        events = work.rows(text("SELECT memory_id FROM memory_event"))
    assert {row.id for row in rows} == {kept.id} == {row.memory_id for row in events}


def recalled(database: Database, query: str, **fields: object) -> list[tuple[str, str | None]]:
    asked = RecallQuery(query, "a", sources=(SourceKind.MEMORY,), **fields)  # type: ignore[arg-type] # fields of several types
    return [(one.text, one.kind) for one in Recall(database).search(asked).passages]


def test_recall_finds_what_holds_and_nothing_else(database: Database) -> None:
    old = remember(database, "Ana lives in Bern", user="ana")
    assert recalled(database, "Bern", user="ana") == [("Ana lives in Bern", "fact")]
    assert recalled(database, "Bern", user="ben") == []

    new = NewMemory("Ana lives in Porto", user="ana")
    made = service.shown(service.supersede(database, service.shown(old.id), new, "a", "ana").memory.id)
    assert recalled(database, "Ana lives", user="ana") == [("Ana lives in Porto", "fact")]
    service.mark(database, made, "a", "ana")
    assert recalled(database, "Porto", user="ana") == [("Ana lives in Porto", "breakthrough")]
    forgetting.forget(database, [made], "a")
    assert recalled(database, "Porto", user="ana") == []


def test_one_unknown_id_forgets_nothing(database: Database) -> None:
    made = service.shown(remember(database, "Ana likes tea").id)

    with pytest.raises(NotFound):
        forgetting.forget(database, [made, f"mem_{'0' * 32}"], "a")

    assert texts_of(database, namespace="a") == ["Ana likes tea"]


def test_a_user_is_forgotten_and_others_are_not(database: Database) -> None:
    for number in range(3):
        remember(database, f"Fact {number}", user="ana")
    ended = remember(database, "Old fact", user="ana")
    service.invalidate(database, service.shown(ended.id), "a", "ana")
    remember(database, "Fact 0", user="ben")
    remember(database, "Fact 0", namespace="b", user="ana")

    done = forgetting.forget_user(database, "a", "ana")

    assert len(done.ids) == 4
    assert done.is_proved
    assert texts_of(database, user="ana", all_times=True) == ["Fact 0"]
    assert texts_of(database, namespace="a", all_times=True) == ["Fact 0"]


@pytest.mark.parametrize(
    ("new", "field"),
    [
        (NewMemory("  "), "text"),
        (NewMemory("x" * 2_001), "text"),
        (NewMemory("a\x00b"), "text"),
        (NewMemory("a", user="u" * 201), "user"),
        (NewMemory("a", user=" "), "user"),
        (NewMemory("a", importance=1.5), "importance"),
        (NewMemory("a", confidence=float("nan")), "confidence"),
        (NewMemory("a", sources=[MemorySource(MemoryOrigin.HAND)] * 101), "sources"),
        (NewMemory("a", valid_from=datetime(2099, 1, 1, tzinfo=UTC)), "valid_from"),
        (NewMemory("a", valid_from=datetime(2026, 1, 1)), "valid_from"),  # noqa: DTZ001 it is the point
    ],
)
def test_what_is_no_memory_is_refused_by_field(database: Database, new: NewMemory, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        service.remember(database, new, "a", "ana")
    assert caught.value.problems[0].where == field

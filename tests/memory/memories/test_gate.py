"""The write gate: what the messages say passes, what they do not say does not, with the reason."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest

from app.memory.memories import gate
from app.memory.memories.gate import GateMessage, GateReason, KnownMemory, ProposedMemory
from app.memory.memories.kinds import MemoryKind

TALK = [
    GateMessage(1, "system", "You are helpful. The user lives in Oslo and has 3 cats."),
    GateMessage(2, "user", "Hi! I moved from Bern to Zürich in 2021, and I don't eat meat, I prefer tofu.", "Ana"),
    GateMessage(3, "assistant", "Nice. You probably own a bicycle, then."),
    GateMessage(4, "user", "We decided to use Postgres 16 for the ledger. My sister Carla works at Siemens."),
    GateMessage(5, "assistant", "So the ledger goes to Postgres 16. Batching the writes will cut the cost by 40 %."),
]


def reason_of(
    text: str, kind: MemoryKind = MemoryKind.FACT, known: list[KnownMemory] | None = None, **fields: object
) -> GateReason | None:
    (found,) = gate.decide([ProposedMemory(text, kind, **fields)], TALK, known or [])  # type: ignore[arg-type] # fields of several types
    return found.reason


@pytest.mark.parametrize(
    "text",
    [
        "The user moved from Bern to Zürich in 2021.",
        "Ana prefers tofu",
        "The user does not eat meat.",
        "The user's sister Carla works at Siemens.",
        "Carla is the sister of Ana and works at Siemens",
    ],
)
def test_what_the_user_said_passes(text: str) -> None:
    assert reason_of(text) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The user moved to Zürich in 2022.", GateReason.NOT_GROUNDED),  # another number
        ("The user moved from Bern to Genf in 2021.", GateReason.NOT_GROUNDED),  # another name
        ("The user eats meat.", GateReason.NOT_GROUNDED),  # without the negation
        ("The user does not prefer tofu.", GateReason.NOT_GROUNDED),  # with one that is not there
        ("The user lives in Oslo and has 3 cats.", GateReason.NOT_GROUNDED),  # from the prompt alone
        ("The user enjoys hiking in the mountains.", GateReason.NOT_GROUNDED),
        ("The user works at Siemens.", GateReason.NOT_GROUNDED),  # it is the sister who does
        ("The user owns a bicycle", GateReason.ONLY_ASSISTANT),
        ("tofu", GateReason.TOO_SHORT),
        ("The user prefers tofu " + "and tofu " * 60, GateReason.TOO_LONG),
        ("Does the user prefer tofu?", GateReason.JUNK),
        ("The user asked about tofu", GateReason.JUNK),
        ("tofu tofu tofu tofu", GateReason.JUNK),
        ("The user likes <thing>", GateReason.JUNK),
        ("No new memories here", GateReason.JUNK),
        ("The user likes it.", GateReason.JUNK),
    ],
)
def test_what_they_did_not_say_is_refused_with_the_reason(text: str, reason: GateReason) -> None:
    assert reason_of(text) is reason


def test_a_question_says_nothing_unless_it_is_answered() -> None:
    talk = [
        GateMessage(1, "user", "Is there a good book on knots?"),
        GateMessage(2, "assistant", "Yes. Do you sail a dinghy?"),
        GateMessage(3, "user", "Yes, since May."),
    ]
    asked = [ProposedMemory("The user has a good book on knots."), ProposedMemory("The user sails a dinghy since May.")]
    assert [one.reason for one in gate.decide(asked, talk, [])] == [GateReason.NOT_GROUNDED, None]


def test_a_decision_may_be_in_the_words_of_the_assistant() -> None:
    assert reason_of("Batching the writes will cut the cost by 40 %", MemoryKind.BREAKTHROUGH) is None
    assert reason_of("Batching the writes will cut the cost by 40 %") is GateReason.ONLY_ASSISTANT


def test_what_is_known_is_not_written_again() -> None:
    known = [KnownMemory(0, "User moved from Bern to Zürich in 2021"), KnownMemory(1, "User eats no meat", holds=False)]

    assert reason_of("The user moved from Bern to Zürich in 2021.", known=known) is GateReason.DUPLICATE
    assert reason_of("The user moved to Zürich", known=known) is GateReason.RESTATEMENT
    assert reason_of("The user does not eat meat.", known=known) is None, "the user says again what had ended"


def test_the_assistant_does_not_bring_back_what_has_ended() -> None:
    """It repeats what its prompt told it; without this, an old fact would return for ever."""
    known = [KnownMemory(0, "The ledger goes to MySQL 8", holds=False)]
    talk = [GateMessage(1, "user", "Which one?"), GateMessage(2, "assistant", "The ledger goes to MySQL 8.")]

    (found,) = gate.decide([ProposedMemory("The ledger goes to MySQL 8", MemoryKind.DECISION)], talk, known)
    assert (found.reason, found.same_as) == (GateReason.RESTATEMENT, 0)


def test_what_is_known_in_other_words_is_not_written_again() -> None:
    """By the cosine, unless the statements have other numbers, names or negations, or words that exclude each other."""

    def decided(known: str, cosine: float, text: str = "The user prefers tofu.") -> gate.GateDecision:
        (found,) = gate.decide([ProposedMemory(text)], TALK, [KnownMemory(3, known)], [{3: cosine}])
        return found

    found = decided("The user prefers bean curd.", 0.95)
    assert (found.reason, found.same_as) == (GateReason.DUPLICATE, 3)
    assert found.detail == "a memory says it in other words (cosine 0.95)"
    assert decided("The user prefers bean curd.", 0.85).reason is None
    assert decided("The user prefers no bean curd.", 0.95).reason is None, "a negation"
    assert decided("The user prefers 2 kinds of bean curd.", 0.95).reason is None, "a number"
    assert decided("Carla prefers bean curd.", 0.95).reason is None, "a name"
    sister = "The user's sister Carla works at Siemens."
    assert decided("Carla of Siemens is an employed brother of the user", 0.95, sister).reason is None, "a contrast"
    replacing = ProposedMemory("The user prefers tofu.", replaces=3)
    (found,) = gate.decide([replacing], TALK, [KnownMemory(3, "The user prefers bean curd.")], [{3: 0.95}])
    assert (found.reason, found.replaces) == (None, 3), "what the model replaces is not the same"


def test_words_that_exclude_each_other_are_not_the_same() -> None:
    assert gate.says_the_same("The user wants dark mode on.", "The user wants the dark mode on")
    assert not gate.says_the_same("The user wants dark mode on.", "The user wants dark mode off.")
    assert not gate.means_the_same("The user bought a house in Graz.", "The user sold a house in Graz.", 0.99)
    assert gate.means_the_same("The user purchased a house in Graz.", "The user bought a home in Graz.", 0.96)


def test_two_proposals_that_say_the_same_are_one() -> None:
    said = [ProposedMemory("Ana prefers tofu"), ProposedMemory("ana prefers tofu.")]
    assert [one.reason for one in gate.decide(said, TALK, [])] == [None, GateReason.DUPLICATE]


def test_a_memory_takes_the_place_of_one_about_the_same_subject_only() -> None:
    known = [
        KnownMemory(0, "The user moved to Bern in 2019"),
        KnownMemory(1, "Carla plays chess"),
        KnownMemory(2, "The user moved from Chur", holds=False),
    ]

    def replaced(number: int) -> int | None:
        proposed = ProposedMemory("The user moved from Bern to Zürich in 2021", replaces=number)
        (found,) = gate.decide([proposed], TALK, known)
        assert found.reason is None
        return found.replaces

    assert [replaced(number) for number in (0, 1, 2, 7, -1)] == [0, None, None, None, None]


def test_the_sources_are_those_that_say_it_whatever_the_model_named() -> None:
    (found,) = gate.decide([ProposedMemory("The sister Carla works at Siemens", messages=[2, 99])], TALK, [])
    assert found.messages == (4,)


NAMES = ["Carla", "Miguel", "Yuki", "Priya", "Olaf"]
CITIES = ["Bern", "Porto", "Kyoto", "Pune", "Oslo"]
THINGS = ["tea", "tofu", "chess", "jazz", "rye bread"]


def _facts(chance: random.Random) -> Iterator[tuple[str, str, list[str]]]:
    """What a user says, a memory of it, and memories that are nearly it and wrong."""
    name, city, thing, number = (*(chance.choice(of) for of in (NAMES, CITIES, THINGS)), chance.randrange(10, 99))
    other_name, other_city = (chance.choice([one for one in of if one not in (name, city)]) for of in (NAMES, CITIES))
    yield (
        f"By the way, my daughter {name} is {number} and moved to {city}.",
        f"The user's daughter {name} is {number} and lives in {city}.",
        [
            f"The user's daughter {other_name} is {number} and lives in {city}.",
            f"The user's daughter {name} is {number + 1} and lives in {city}.",
            f"The user's daughter {name} is {number} and lives in {other_city}.",
            f"The user's daughter {name} is a surgeon in {city}.",
        ],
    )
    yield (
        f"Please remember that I never buy {thing} on Sundays.",
        f"The user never buys {thing} on Sundays.",
        [f"The user buys {thing} on Sundays.", f"The user never buys {thing} on Mondays."],
    )


def test_seeded_cases_pass_and_their_corruptions_do_not() -> None:
    chance = random.Random(11)
    wrong: Counter[str] = Counter()
    for _ in range(200):
        for said, good, bad in _facts(chance):
            filler = [
                GateMessage(1, "user", "Good morning, what is the weather like?"),
                GateMessage(2, "assistant", "I cannot see the weather from here."),
            ]
            talk = [*filler, GateMessage(3, "user", said), GateMessage(4, "assistant", "Noted, thank you.")]
            for text, passes in [(good, True), *((text, False) for text in bad)]:
                (found,) = gate.decide([ProposedMemory(text)], talk, [])
                if (found.reason is None) != passes:
                    wrong[f"{text} -> {found.reason} {found.detail}"] += 1

    assert wrong == Counter()

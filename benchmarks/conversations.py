# ruff: noqa: E501 tables of texts
"""
Generated conversations with questions whose answers and evidence are known.

    python -m benchmarks.conversations --seed 7 --json FILE

Two people talk about the people and things around them, with small talk, and with as many facts that nobody asks for. Each question names the utterances that
answer it. The same seed gives the same conversations. Kinds of questions:

    single    one utterance has the answer
    two_hop   two utterances have it together: "Mira is Anna's sister", "Mira plays the cello"
    time      when something happened, or what happened at a time
    changed   a fact that was stated, and later replaced: the later one counts
    absent    nothing was said about it: there is no answer

Facts and questions use different words where people would; every relation is told of several people, so that a name or a
relation alone finds too much.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

#: Questions of each kind for one conversation: 40.
KINDS = {"single": 12, "two_hop": 8, "time": 8, "changed": 6, "absent": 6}

#: Share of the other utterances that have a fact that nobody asks for.
_DENSE = 0.7


@dataclass(frozen=True, slots=True)
class Utterance:
    id: str
    speaker: str
    text: str
    at: str


@dataclass(frozen=True, slots=True)
class Question:
    id: str
    kind: str
    text: str
    #: None where nothing was said about it.
    answer: str | None
    evidence: tuple[str, ...]


@dataclass(slots=True)
class GeneratedConversation:
    id: str
    speakers: tuple[str, str]
    utterances: list[Utterance] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)


_NAMES = [
    "Anna",
    "Boris",
    "Carla",
    "Dmitri",
    "Elif",
    "Farid",
    "Greta",
    "Hamza",
    "Ines",
    "Jonas",
    "Katya",
    "Levi",
    "Mira",
    "Nadia",
    "Omar",
    "Petra",
    "Quentin",
    "Rosa",
    "Stefan",
    "Tara",
    "Ugo",
    "Vera",
    "Walid",
    "Ximena",
    "Yara",
    "Zoltan",
    "Amelie",
    "Bruno",
    "Celia",
    "Dario",
    "Edda",
    "Felix",
    "Gilda",
    "Hugo",
    "Iris",
    "Jakub",
    "Klara",
    "Lorenz",
    "Magda",
    "Nils",
]
_CITIES = [
    "Graz",
    "Porto",
    "Turku",
    "Lyon",
    "Bergen",
    "Gdansk",
    "Sofia",
    "Leeds",
    "Ghent",
    "Malmo",
    "Split",
    "Bilbao",
    "Trieste",
    "Kaunas",
    "Cork",
    "Basel",
    "Toledo",
    "Krakow",
    "Utrecht",
    "Nantes",
    "Sibiu",
    "Lucca",
    "Aarhus",
    "Zadar",
    "Linz",
    "Cadiz",
    "Dresden",
    "Tartu",
    "Bergamo",
    "Varna",
]
_JOBS = [
    "nurse",
    "carpenter",
    "pilot",
    "librarian",
    "chemist",
    "baker",
    "judge",
    "plumber",
    "translator",
    "surveyor",
    "florist",
    "electrician",
    "dentist",
    "archivist",
    "beekeeper",
    "optician",
    "tailor",
    "geologist",
    "paramedic",
    "cartographer",
]
_FOODS = [
    "lasagne",
    "dumplings",
    "paella",
    "goulash",
    "ramen",
    "risotto",
    "falafel",
    "moussaka",
    "pierogi",
    "ratatouille",
    "curry",
    "gnocchi",
    "tagine",
    "polenta",
    "borscht",
    "ceviche",
]
_PETS = ["parrot", "tortoise", "greyhound", "ferret", "hamster", "goldfish", "beagle", "rabbit", "gecko", "donkey"]
_INSTRUMENTS = ["cello", "trumpet", "accordion", "harp", "oboe", "mandolin", "drums", "clarinet", "banjo", "organ"]
_SUBJECTS = ["astronomy", "botany", "statistics", "law", "pottery", "Hebrew", "chess", "geology", "weaving", "acting"]
_CARS = ["tractor", "scooter", "caravan", "tandem", "van", "canoe", "motorbike", "hatchback", "sailboat", "cargo bike"]
_COLOURS = ["turquoise", "ochre", "crimson", "olive", "lilac", "beige", "indigo", "amber", "scarlet", "ivory"]
_MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
_KIN = ["sister", "brother", "neighbour", "cousin", "boss", "dentist", "landlord", "flatmate", "teacher", "godmother"]

#: Ways to tell a fact about somebody, the question for it, and the values.
_RELATIONS: dict[str, tuple[tuple[str, ...], str, Sequence[str]]] = {
    "home": (("{who} has a flat in {value} these days", "{who} settled in {value}"), "In which city does {who} live?", _CITIES),
    "job": (("{who} earns a living as a {value}", "{who} got hired as a {value}"), "What is {who}'s profession?", _JOBS),
    "dish": (("nothing makes {who} happier than {value}", "{who} could eat {value} every single day"), "What is {who}'s favourite dish?", _FOODS),
    "pet": (("{who} came home with a {value} from the shelter", "{who} takes the {value} to the vet all the time"), "What kind of pet does {who} own?", _PETS),
    "instrument": (("{who} practises the {value} until the walls shake", "you can hear {who} and that {value} through the door"), "Which instrument does {who} play?", _INSTRUMENTS),
    "study": (("{who} signed up for evening classes in {value}", "{who} spends the weekends on {value} lectures"), "What subject is {who} studying?", _SUBJECTS),
    "vehicle": (("{who} sold everything else and drives a {value}", "{who} finally bought a {value}"), "Which vehicle does {who} have?", _CARS),
    "colour": (("{who} painted the whole kitchen {value}", "the kitchen of {who} is {value} now"), "What colour is {who}'s kitchen?", _COLOURS),
    "locker": (("{who} keeps the keys in locker {value}", "the locker that {who} rents is {value}"), "What is the number of {who}'s locker?", [f"{a}-{n}" for a in "ABCDEFG" for n in range(101, 141, 3)]),
    "rent": (("{who} pays {value} euros for that place each month", "they charge {who} {value} euros a month"), "How much is {who}'s rent?", [str(n) for n in range(410, 990, 7)]),
}  # fmt: skip
_CHANGES = {
    "home": ("{who} packed everything and moved to {value} for good", "In which city does {who} live now?"),
    "job": ("{who} quit and works as a {value} from now on", "What is {who}'s profession now?"),
    "rent": ("the rent of {who} went to {value} euros", "How much is {who}'s rent at present?"),
    "vehicle": ("{who} traded it in and has a {value} instead", "Which vehicle does {who} have now?"),
}
_EVENTS = [
    ("broke a wrist", "break a wrist"), ("won the raffle", "win the raffle"), ("ran the half marathon", "run the half marathon"),
    ("missed the ferry", "miss the ferry"), ("passed the driving test", "pass the driving test"),
    ("opened a tiny bookshop", "open a tiny bookshop"), ("adopted twins", "adopt twins"), ("lost the wedding ring", "lose the wedding ring"),
    ("gave a talk at the museum", "give a talk at the museum"), ("planted forty apple trees", "plant forty apple trees"),
    ("got stuck in the lift", "get stuck in the lift"), ("saw the northern lights", "see the northern lights"),
]  # fmt: skip
_OPENINGS = ["By the way, ", "You know, ", "I nearly forgot: ", "Guess what, ", "Apparently ", "Well, ", "Oh, and ", ""]
_CLOSINGS = [
    ", so that is that.", ", can you believe it?", ", or so I was told.", ", which was a bit of a surprise to me.",
    ", and I think it is a good thing.", ".", ", as far as I know.",
]  # fmt: skip
_SMALL_TALK = [
    "How was your {day}? Mine was rather long, and I did not do very much apart from {chore}.",
    "I think that we should really do something about {topic}, because it has been going on for a while now.",
    "That reminds me of the time when we were all sitting in the {place} and nobody said a word.",
    "The weather is {weather} again, so I am probably going to stay at home and do {chore}.",
    "Have you heard anything about {topic}? I would like to know more about it.",
    "It was so nice to see you in the {place} the other day, we should do that more often.",
    "I have been thinking about {topic} a lot, and I am still not sure what I should do.",
    "Sorry for the late answer, I was busy with {chore} and then I fell asleep.",
    "What do you think about {topic}? I have got mixed feelings, to be honest.",
    "They say that it is going to be {weather} on {day}, but I do not really believe it.",
    "Yes, I agree with you, and I would also say that {topic} is a part of it.",
    "No, not really. I was in the {place} for most of the {day}, so I did not notice.",
]
_FILL = {
    "day": [*["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"], "weekend", "morning", "afternoon"],
    "chore": ["the laundry", "some cooking", "the dishes", "a bit of gardening", "my tax papers", "the ironing", "a long walk"],
    "topic": ["the new bus line", "that film", "the garden fence", "our book club", "the election", "the noise upstairs", "the recipe", "that podcast", "the school fair"],
    "place": ["park", "kitchen", "office", "café", "train", "library", "waiting room", "harbour", "old cinema"],
    "weather": ["rainy", "windy", "foggy", "sunny", "freezing", "muggy", "cloudy"],
}  # fmt: skip


def generate(seed: int, conversations: int = 50, utterances: int = 160) -> list[GeneratedConversation]:
    """Return conversations, each with 40 questions. One has at least as many utterances as its facts need (about 60)."""
    return [
        _conversation(random.Random(f"{seed}/{number}"), f"c{number}", utterances) for number in range(conversations)
    ]


def _conversation(chance: random.Random, id_: str, utterances: int) -> GeneratedConversation:
    names = chance.sample(_NAMES, 24)
    made = GeneratedConversation(id_, (names[0], names[1]))
    people = names[2:]
    #: Facts in the order of their utterances, each with the questions that it answers.
    facts: list[tuple[float, str]] = []
    pending: list[tuple[str, str, str | None, list[int]]] = []

    def tell(text: str, when: float | None = None) -> int:
        facts.append((chance.random() if when is None else when, text))
        return len(facts) - 1

    told: set[tuple[str, str]] = set()
    pairs = [(who, relation) for who in people for relation in _RELATIONS]
    chance.shuffle(pairs)

    def new_pair(among: Sequence[str] = ()) -> tuple[str, str]:
        return next(p for p in pairs if p not in told and (not among or p[1] in among))

    def state(who: str, relation: str, when: float | None = None) -> tuple[int, str]:
        told.add((who, relation))
        ways, _, values = _RELATIONS[relation]
        value = chance.choice(values)
        return tell(chance.choice(ways).format(who=who, value=value), when), value

    for _ in range(KINDS["single"]):
        who, relation = new_pair()
        fact, value = state(who, relation)
        pending.append(("single", _RELATIONS[relation][1].format(who=who), value, [fact]))
    kin: set[tuple[str, str]] = set()
    for _ in range(KINDS["two_hop"]):
        who, relation = new_pair()
        owner = chance.choice([one for one in people if one != who])
        role = chance.choice([one for one in _KIN if (owner, one) not in kin])
        kin.add((owner, role))
        link = tell(f"{who} is {owner}'s {role}")
        fact, value = state(who, relation)
        pending.append(("two_hop", _RELATIONS[relation][1].format(who=f"{owner}'s {role}"), value, [link, fact]))
    dates: set[str] = set()
    for number in range(KINDS["time"]):
        who, (past, base) = chance.choice(people), chance.choice(_EVENTS)
        date = next(d for d in iter(lambda: f"{chance.randint(1, 28)} {chance.choice(_MONTHS)}", "") if d not in dates)
        dates.add(date)
        fact = tell(f"{who} {past} on {date}")
        asked = f"On which date did {who} {base}?" if number % 2 else f"What did {who} do on {date}?"
        pending.append(("time", asked, date if number % 2 else past, [fact]))
    for _ in range(KINDS["changed"]):
        who, relation = new_pair(tuple(_CHANGES))
        _, old = state(who, relation, chance.random() * 0.5)
        way, asked = _CHANGES[relation]
        value = chance.choice([one for one in _RELATIONS[relation][2] if one != old])
        later = tell(way.format(who=who, value=value), 0.5 + chance.random() * 0.5)
        pending.append(("changed", asked.format(who=who), value, [later]))
    for _ in range(KINDS["absent"]):
        who, relation = new_pair()
        told.add((who, relation))
        pending.append(("absent", _RELATIONS[relation][1].format(who=who), None, []))
    strangers = [name for name in _NAMES if name not in names]
    _write(chance, made, facts, pending, utterances, strangers)
    return made


def _unasked(chance: random.Random, strangers: Sequence[str]) -> str:
    """A fact that nobody asks for, about people whom no question names: as dense as those that are asked for."""
    who = chance.choice(strangers)
    match chance.randrange(4):
        case 0:
            return f"{who} {chance.choice(_EVENTS)[0]} on {chance.randint(1, 28)} {chance.choice(_MONTHS)}"
        case 1:
            return f"{who} is {chance.choice([one for one in strangers if one != who])}'s {chance.choice(_KIN)}"
        case _:
            ways, _, values = chance.choice(list(_RELATIONS.values()))
            return chance.choice(ways).format(who=who, value=chance.choice(values))


def _write(
    chance: random.Random,
    made: GeneratedConversation,
    facts: Sequence[tuple[float, str]],
    pending: Sequence[tuple[str, str, str | None, list[int]]],
    utterances: int,
    strangers: Sequence[str],
) -> None:
    """Put the facts among small talk and facts that nobody asks for, and number everything."""
    order = sorted(range(len(facts)), key=lambda i: facts[i][0])
    slots = sorted(chance.sample(range(max(utterances, len(facts))), len(facts)))
    at_slot = dict(zip(slots, order, strict=True))
    clock, place = datetime(2026, 1, 5, 9, 0, tzinfo=UTC), {}
    for number in range(max(utterances, len(facts))):
        clock += timedelta(minutes=chance.randint(1, 600))
        text = chance.choice(_SMALL_TALK).format(**{name: chance.choice(values) for name, values in _FILL.items()})
        fact = at_slot.get(number)
        if fact is not None or chance.random() < _DENSE:
            if fact is not None:
                place[fact] = f"{made.id}.{number}"
            core = facts[fact][1] if fact is not None else _unasked(chance, strangers)
            told = f"{chance.choice(_OPENINGS)}{core}{chance.choice(_CLOSINGS)}"
            told = told[0].upper() + told[1:]
            text = chance.choice([told, f"{told} {text}", f"{text} {told}"])
        made.utterances.append(Utterance(f"{made.id}.{number}", made.speakers[number % 2], text, clock.isoformat()))
    chance_order = list(pending)
    chance.shuffle(chance_order)
    for number, (kind, text, answer, evidence) in enumerate(chance_order):
        made.questions.append(
            Question(f"{made.id}.q{number}", kind, text, answer, tuple(place[one] for one in evidence))
        )


def questions(made: Sequence[GeneratedConversation]) -> Iterator[tuple[GeneratedConversation, Question]]:
    """Yield every question with its conversation."""
    yield from ((one, question) for one in made for question in one.questions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--conversations", type=int, default=50)
    parser.add_argument("--utterances", type=int, default=160)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    made = generate(given.seed, given.conversations, given.utterances)
    given.json.write_text(json.dumps([asdict(one) for one in made], indent=1))
    print(f"{len(made)} conversations, {sum(len(one.questions) for one in made)} questions: {given.json}")


if __name__ == "__main__":
    main()

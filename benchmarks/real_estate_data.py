"""
Seeded data of a property market, in the shape of public tables, for the examples, the tests and the benchmark.

    python -m benchmarks.real_estate_data examples/real-estate     # writes the files of the examples

Sales have the columns of King County's house sales (`kc_house_data`), prices by month those of a series of FRED
(`observation_date`, a value). No row is taken from them. The laws of the market are not those that the functions fit:
places have bumps, age acts in a curve, and one sale in twenty is far off.
"""

from __future__ import annotations

import csv
import io
import json
import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

SALES_COLUMNS = (
    *("id", "date", "price", "bedrooms", "bathrooms", "sqft_living", "sqft_lot", "floors", "waterfront", "view"),
    *("condition", "grade", "yr_built", "zipcode", "lat", "long"),
)


def sales(seed: int, count: int, *, first: date = date(2014, 5, 2), days: int = 390) -> list[dict[str, Any]]:
    """Return sales, the oldest first."""
    chance = random.Random(f"sales/{seed}")
    centres = [(47.15 + 0.6 * chance.random(), -122.5 + 0.9 * chance.random()) for _ in range(24)]
    zips = [(98001 + i, centre, chance.gauss(0, 0.22)) for i, centre in enumerate(centres)]
    bumps = [(*chance.choice(centres), chance.uniform(0.02, 0.06), chance.gauss(0, 0.25)) for _ in range(10)]
    rows = []
    for number in range(count):
        area, centre, level = chance.choice(zips)
        lat, long = centre[0] + chance.gauss(0, 0.03), centre[1] + chance.gauss(0, 0.04)
        grade = min(13, max(4, round(chance.gauss(7.5, 1.2))))
        size = round(min(9_000, max(420, math.exp(chance.gauss(7.1 + 0.13 * grade - 0.45, 0.3)))), -1)
        built = chance.randint(1905, 2014)
        bedrooms = min(8, max(1, round(size / 650 + chance.gauss(0.3, 0.7))))
        bathrooms = max(1.0, round(4 * (bedrooms * 0.6 + chance.gauss(0.2, 0.4))) / 4)
        condition = min(5, max(1, round(chance.gauss(3.4, 0.7))))
        view = chance.choices([0, 1, 2, 3, 4], [90, 2, 4, 2, 2])[0]
        water = 1 if chance.random() < 0.008 else 0
        sold = first + timedelta(days=chance.randrange(days))
        age = sold.year - built
        logarithm = (
            *(12.75 + level, 0.62 * math.log(size / 2_000), 0.15 * (grade - 7.5), 0.05 * (condition - 3), 0.06 * view),
            *(0.45 * water, -0.16 * math.sin(math.pi * min(age, 90) / 110), 0.0025 * (sold - first).days / 30.4),
            *(0.04 * math.sin(2 * math.pi * (sold.month - 4) / 12), 0.02 * (bathrooms - 2)),
            sum(
                height * math.exp(-((lat - north) ** 2 + 0.45 * (long - east) ** 2) / (2 * wide**2))
                for north, east, wide, height in bumps
            ),
            chance.gauss(0, 0.11) if chance.random() < 0.95 else chance.gauss(0, 0.35),
        )
        rows.append(
            {
                "id": f"S{number:05d}",
                "date": sold.strftime("%Y%m%dT000000"),
                "price": round(math.exp(sum(logarithm)), -2),
                "bedrooms": bedrooms,
                "bathrooms": bathrooms,
                "sqft_living": int(size),
                "sqft_lot": int(size * math.exp(chance.gauss(1.1, 0.5))),
                "floors": chance.choice([1, 1, 1.5, 2, 2, 3]),
                "waterfront": water,
                "view": view,
                "condition": condition,
                "grade": grade,
                "yr_built": built,
                "zipcode": str(area),
                "lat": round(lat, 4),
                "long": round(long, 4),
            }
        )
    return sorted(rows, key=lambda row: (row["date"], row["id"]))


def prices(seed: int, months: int, first: date = date(2012, 1, 1)) -> list[dict[str, Any]]:
    """Return the median price of each month: a trend that turns, seasons, and noise that lasts."""
    chance = random.Random(f"prices/{seed}")
    level, growth, lasting = math.log(300_000), chance.gauss(0.004, 0.002), 0.0
    season = [0.05 * math.sin(2 * math.pi * (month - 3 + chance.gauss(0, 0.4)) / 12) for month in range(12)]
    rows = []
    for i in range(months):
        growth = 0.93 * growth + 0.07 * 0.003 + chance.gauss(0, 0.0012)
        level += growth
        lasting = 0.6 * lasting + chance.gauss(0, 0.006)
        month = date(first.year + (first.month - 1 + i) // 12, (first.month - 1 + i) % 12 + 1, 1)
        value = math.exp(level + season[month.month - 1] + lasting + chance.gauss(0, 0.006))
        rows.append({"observation_date": month.isoformat(), "MEDIAN_PRICE": round(value)})
    return rows


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV."""
    target = io.StringIO()
    writer = csv.DictWriter(target, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return target.getvalue()


#: What leads write for each topic. None of these sentences is an example of the workflow's prompt.
SAID: Mapping[str, Sequence[str]] = {
    "budget": (
        "We can spend up to {budget:,} dollars.",
        "Our budget is {budget:,}.",
        "I can pay at most {budget:,} for a home.",
    ),
    "cash": ("I would buy it in cash.", "We sold our last home and can pay cash at once."),
    "approved": ("Our mortgage is pre-approved by the bank.", "The bank has given us a written approval for the loan."),
    "loan": ("I still need to find a bank that gives me a loan.", "We have not talked to a bank about a mortgage yet."),
    "soon": (
        "Our lease ends in four weeks, so we need to move soon.",
        "I start my new job next month and must move now.",
    ),
    "later": ("There is no hurry, maybe we buy in two years.", "We want to wait until the children finish school."),
    "viewing": ("When can we visit the house?", "I would like to see the apartment this weekend."),
    "curious": ("I am just curious what homes cost here.", "We are only browsing for now."),
    "wish": ("We want four bedrooms and a big kitchen.", "It should have a garage and be close to a school."),
    "other": ("Thanks for your quick answer!", "Hello there.", "My wife saw your advertisement in the newspaper."),
}


@dataclass(frozen=True, slots=True)
class Lead:
    """A conversation, with what is true of it."""

    conversation: list[dict[str, str]]
    #: Each sentence of the lead with its topic.
    topics: Sequence[tuple[str, str]]
    asking_price: int


def leads(seed: int, count: int) -> list[Lead]:
    """Return conversations with buyers who mean it more or less."""
    chance = random.Random(f"leads/{seed}")
    found = []
    for number in range(count):
        price = chance.randrange(200_000, 900_000, 5_000)
        serious = chance.random()
        topics = ["other"]
        if chance.random() < 0.75:
            topics.append("budget")
        topics += chance.sample(["wish"], int(chance.random() < 0.6))
        if chance.random() < 0.8:
            topics.append("loan" if serious < 0.35 else chance.choice(["cash", "approved"]))
        if chance.random() < 0.8:
            topics.append("later" if serious < 0.4 else "soon")
        if chance.random() < 0.8:
            topics.append("curious" if serious < 0.3 else "viewing")
        chance.shuffle(topics)
        budget = round(price * chance.uniform(0.7 if serious < 0.5 else 0.9, 1.15), -3)
        sentences = [(chance.choice(SAID[topic]).format(budget=int(budget)), topic) for topic in topics]
        if serious > 0.5 and chance.random() < 0.8:
            sentences.append((f"My e-mail is lead{number}@example.com.", "other"))
        half = (len(sentences) + 1) // 2
        parts = [" ".join(text for text, _ in some) for some in (sentences[:half], sentences[half:])]
        conversation = [
            {"sender": "agent", "text": "Welcome! What are you looking for? The asking price is fair."},
            {"sender": "lead", "text": parts[0]},
            {"sender": "agent", "text": "Thank you. Can you tell me more?"},
            *([{"sender": "lead", "text": parts[1]}] if parts[1] else []),
        ]
        found.append(Lead(conversation, sentences, price))
    return found


_PEOPLE = (
    "Mara Lindqvist",
    "Owen Castell",
    "Priya Raman",
    "Jonas Weber",
    "Elena Duarte",
    "Theo Marchetti",
    "Hannah Cole",
)
_STREETS = ("Alder Street", "Birch Avenue", "Canal Road", "Harbor Lane", "Mill Court")
_SPELLED_MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)


def _day(chance: random.Random, year: int) -> tuple[str, str]:
    """Return a day as it is written, and in its plain form."""
    day = date(year, chance.randint(1, 12), chance.randint(1, 28))
    spelled = _SPELLED_MONTHS[day.month - 1]
    forms = (day.isoformat(), f"{spelled} {day.day}, {day.year}", f"{day.day} {spelled} {day.year}", f"{day:%m/%d/%Y}")
    return chance.choice(forms), day.isoformat()


@dataclass(frozen=True, slots=True)
class Paper:
    """A document, with the values that it has."""

    kind: str
    pages: Sequence[Sequence[str]]
    truth: Mapping[str, Any]


def papers(seed: int, count: int) -> list[Paper]:
    """Return leases, deeds and inspection reports; in a quarter of them a field is missing or written in prose."""
    chance = random.Random(f"papers/{seed}")
    return [(_lease, _deed, _inspection)[number % 3](chance) for number in range(count)]


def _lease(chance: random.Random) -> Paper:
    landlord, tenant = chance.sample(_PEOPLE, 2)
    rent = chance.randrange(900, 4_200, 25)
    address = f"{chance.randint(1, 99)} {chance.choice(_STREETS)}"
    (start, starts), (end, ends) = _day(chance, 2026), _day(chance, 2027)
    deposit = chance.random() > 0.25
    parties = [
        "This lease is made between the parties below.",
        chance.choice([f"Landlord: {landlord}", f"Lessor: {landlord}, an individual"]),
        chance.choice([f"Tenant: {tenant}", f"Lessee: {tenant}"]),
        f"Premises: {address}",
    ]
    prose = [
        f"This lease is made between {landlord}, as the landlord, and {tenant}, as the tenant.",
        f"The premises at {address} are let for living only.",
    ]
    first = [
        "RESIDENTIAL LEASE AGREEMENT",
        *(prose if chance.random() < 0.3 else parties),
        "1. Term. " + chance.choice([f"The commencement date is {start}.", f"The lease begins on {start}."]),
        chance.choice([f"Expiration: {end}", f"It ends on {end}."]),
    ]
    second = [
        f"2. Rent. The monthly rent is ${rent:,}.00, due on the first day of each month.",
        "A late fee of $50.00 is charged after five days.",
        f"3. Security deposit: ${2 * rent:,}.00" if deposit else "3. No pets are allowed.",
    ]
    values = (landlord, tenant, address, float(rent), 2.0 * rent if deposit else None, starts, ends)
    return Paper("lease", [first, second], dict(zip(_names("lease"), values, strict=True)))


def _deed(chance: random.Random) -> Paper:
    grantor, grantee = chance.sample(_PEOPLE, 2)
    price = chance.randrange(150_000, 900_000, 500)
    parcel = f"{chance.randint(100, 999)}-{chance.randint(100, 999)}-{chance.randint(10, 99)}"
    day, plain = _day(chance, 2025)
    parties = [
        chance.choice([f"Grantor: {grantor}", f"Grantor name: {grantor}, a single person"]),
        chance.choice([f"Grantee: {grantee}", f"Grantee: {grantee}, as sole owner"]),
    ]
    prose = [f"{grantor}, the grantor, gives the land below to {grantee}, the grantee, for ever."]
    lines = [
        "WARRANTY DEED",
        *(prose if chance.random() < 0.3 else parties),
        f"The grantor conveys the land for the consideration of ${price:,}.00, the receipt of which is confirmed.",
        chance.choice([f"Parcel number: {parcel}", f"APN: {parcel}"]),
        chance.choice([f"Dated {day}", f"Executed on {day} before the notary."]),
        "The recording fee is $42.00.",
    ]
    values = (grantor, grantee, parcel, float(price), plain)
    return Paper("deed", [lines], dict(zip(_names("deed"), values, strict=True)))


def _inspection(chance: random.Random) -> Paper:
    inspector = chance.choice(_PEOPLE)
    address = f"{chance.randint(1, 99)} {chance.choice(_STREETS)}"
    roof = chance.choice(["good", "two tiles are missing", "worn, to be replaced"])
    ground = chance.choice(["sound", "a hairline crack at the north wall", "dry"])
    cost = chance.randrange(200, 20_000, 50) if chance.random() > 0.25 else None
    day, plain = _day(chance, 2026)
    lines = [
        "HOME INSPECTION REPORT",
        chance.choice([f"Inspector: {inspector}", f"Inspected by: {inspector}"]),
        f"Property address: {address}",
        chance.choice([f"Inspection date: {day}", f"Date of inspection: {day}"]),
        f"Roof: {roof}",
        f"Foundation: {ground}",
        f"Estimated repairs: ${cost:,}" if cost is not None else "Nothing has to be done now.",
    ]
    values = (inspector, address, plain, roof, ground, None if cost is None else float(cost))
    return Paper("inspection", [lines], dict(zip(_names("inspection"), values, strict=True)))


def _names(kind: str) -> tuple[str, ...]:
    return {
        "lease": ("landlord", "tenant", "premises", "rent", "deposit", "start", "end"),
        "deed": ("grantor", "grantee", "parcel", "consideration", "date"),
        "inspection": ("inspector", "address", "date", "roof", "foundation", "repair_cost"),
    }[kind]


def pdf(pages: Sequence[Sequence[str]]) -> bytes:
    """Return a PDF with these lines on its pages, in Helvetica."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", "", "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for lines in pages:
        shown = [line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)") for line in lines]
        stream = "BT /F1 11 Tf 60 780 Td 16 TL\n" + "\n".join(f"({line}) Tj T*" for line in shown) + "\nET"
        objects.append(f"<< /Length {len(stream.encode('latin-1'))} >>\nstream\n{stream}\nendstream")
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents {len(objects)} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>"
        )
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    content, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(content))
        content += f"{number} 0 obj\n{body}\nendobj\n".encode("latin-1")
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    end = (
        f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\n"
    )
    return content + end.encode() + f"startxref\n{len(content)}\n%%EOF\n".encode()


def files(seed: int = 1) -> dict[str, bytes]:
    """Return the files of the examples by name."""
    subject = sales(seed, 401)[-1]
    known = {column: value for column, value in subject.items() if column not in ("id", "date", "price")}
    found = {
        "sales.csv": as_csv(sales(seed, 401)[:-1]).encode(),
        "subject.json": (json.dumps(known, indent=1) + "\n").encode(),
        "prices.csv": as_csv(prices(seed, 108)).encode(),
        "lead.json": (json.dumps(leads(5, 1)[0].conversation, indent=1) + "\n").encode(),
    }
    for paper in papers(3, 3):
        found[f"{paper.kind}.txt"] = ("\f\n".join("\n".join(page) + "\n" for page in paper.pages)).encode()
        found[f"{paper.kind}.pdf"] = pdf(paper.pages)
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files().items():
        (folder / name).write_bytes(content)
        print(folder / name)


if __name__ == "__main__":
    main()

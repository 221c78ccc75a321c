"""Documents of the personal context: what is valid, how they are divided, and how they are stored."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from app.kernel.database import Database
from app.kernel.errors import InvalidInput, NotFound
from app.kernel.sections.context import ContextSettings
from app.memory.personal import document, storage
from app.memory.personal.document import ContextFormat, ContextKind, ContextSource, NewContextDocument
from app.memory.personal.storage import ContextOwner, DocumentChanged, DocumentOfFolder, TooManyDocuments

ANA, EVERYBODY = ContextOwner("default", "ana"), ContextOwner("default")
SETTINGS = ContextSettings(max_documents=2)
TRAVEL = """---
title: Travel
tags: [trips]
---
Ana lives in Vigo.

## Lisbon
Flight TP123 on 4 May.

```sh
# no heading
```
### Hotel
Avenida 5
## Empty
# Later
Nothing yet.
"""


def md(content: str, kind: ContextKind = ContextKind.PROJECTS, name: str = "travel") -> NewContextDocument:
    return document.parsed(kind, name, ContextFormat.MARKDOWN, content, 10_000)


def js(content: str) -> NewContextDocument:
    return document.parsed(ContextKind.KNOWLEDGE, "facts", ContextFormat.JSON, content, 10_000)


def test_markdown_is_divided_at_its_headings() -> None:
    travel = md(TRAVEL)

    assert (travel.title, travel.tags, travel.always) == ("Travel", ("trips",), False)
    assert [(one.number, one.heading, one.text) for one in document.sections(travel)] == [
        (0, "Travel", "Ana lives in Vigo."),
        (1, "Travel > Lisbon", "Flight TP123 on 4 May.\n\n```sh\n# no heading\n```"),
        (2, "Travel > Lisbon > Hotel", "Avenida 5"),
        (3, "Travel > Later", "Nothing yet."),
    ]
    assert document.body(travel).startswith("Ana lives in Vigo.\n\n## Lisbon")


def test_the_time_for_a_heading_grows_with_its_length_only() -> None:
    blanks = " " * 4_500

    found = document.sections(md(f"## One ## \ntext\n# Two{blanks}x\nmore\n#   {blanks}\nlast"))

    assert [one.text for one in found] == ["text", "more", "last"]
    assert found[0].heading.endswith(" > One")
    assert found[1].heading.endswith(f" > Two{blanks}x")


def test_json_is_divided_at_its_fields_or_items() -> None:
    facts = js('{"title": "Facts", "always": true, "cat": "Pixel", "car": {"make": "Seat"}, "none": ""}')

    assert (facts.title, facts.always) == ("Facts", True)
    assert [one.text for one in document.sections(facts)] == ["cat: Pixel", 'car: {"make": "Seat"}']
    assert [one.text for one in document.sections(js('["one", {"two": 2}]'))] == ["one", '{"two": 2}']
    assert document.body(facts) == 'cat: Pixel\ncar: {"make": "Seat"}'


def test_preferences_are_in_each_prompt_unless_they_say_otherwise() -> None:
    assert md("Answer briefly.", ContextKind.PREFERENCES).always
    assert not md("---\nalways: false\n---\nAnswer briefly.", ContextKind.PREFERENCES).always


def test_no_text_is_lost_when_there_are_too_many_sections() -> None:
    many = document.parsed(
        ContextKind.KNOWLEDGE, "many", ContextFormat.MARKDOWN, "".join(f"# h{n}\nt{n}\n" for n in range(2_100)), 10**6
    )
    found = document.sections(many)

    assert len(found) == document.MAX_SECTIONS
    assert found[-1].text.split()[-1] == "t2099"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: md("  "), "content: it is empty"),
        (lambda: md("a\x00"), "the character U+0000 at 1 is no text"),
        (lambda: md("a" * 10_001), "it has 10001 bytes; accepted: at most 10000 (setting context.max_document_bytes)"),
        (lambda: md("---\ntitle: x\n"), "the front matter has no end"),
        (
            lambda: md("---\ntitel: x\n---\nbody"),
            "content.titel: there is no such field; accepted: title, tags, always",
        ),
        (lambda: md("---\ntitle: [\n---\nbody"), "content (line 2): this is neither YAML nor JSON"),
        (lambda: md("---\ntags: one\n---\nbody"), "content.tags: these are no tags"),
        (lambda: md("---\nalways: sometimes\n---\nbody"), "'sometimes' is neither true nor false"),
        (lambda: md("---\ntitle: x\n---\n"), "it says nothing beside its title and tags"),
        (lambda: md("---\na: &a [x]\nb: *a\n---\nbody"), "there is no such field"),
        (lambda: md("text", name="../etc"), "name: '../etc' is not a valid name"),
        (lambda: js("{"), "this is not JSON"),
        (lambda: js('"text"'), "it is neither an object nor a list"),
        (lambda: js('{"title": 5, "a": 1}'), "content.title: this is no title"),
        (lambda: js("[" * 70 + "]" * 70), "content"),
        (lambda: js("{}"), "it says nothing beside its title and tags"),
    ],
)
def test_what_is_no_document_is_refused_with_what_would_be(make: Callable[[], object], says: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        make()

    assert says in str(refused.value)


def test_documents_are_stored_by_user_kind_and_name(database: Database) -> None:
    with database.work() as work:
        first, created = storage.put_in(work, ANA, md("Vigo"), SETTINGS)
        same, again = storage.put_in(work, ANA, md("Vigo"), SETTINGS)
        changed, _ = storage.put_in(work, ANA, md("Lugo"), SETTINGS, expected=1)
        storage.put_in(work, EVERYBODY, md("Be kind.", ContextKind.PREFERENCES, "tone"), SETTINGS)
        always = storage.always_in(work, ANA, 10)
        listed = storage.list_in(work, "default", user="ana")

    assert (created, again, same.version, changed.version, changed.id) == (True, False, 1, 2, first.id)
    assert [one.name for one in always] == ["tone"]
    assert [(one.name, one.user, one.content) for one in listed] == [("travel", "ana", "")]
    with database.work() as work:
        with pytest.raises(DocumentChanged, match="is at version 2, and the change is based on version 1"):
            storage.put_in(work, ANA, md("Lugo"), SETTINGS, expected=1)
        with pytest.raises(DocumentChanged, match="does not exist"):
            storage.put_in(work, ANA, md("Lugo", name="new"), SETTINGS, expected=1)
        storage.put_in(work, ANA, md("b", name="b"), SETTINGS, source=ContextSource.FOLDER)
        with pytest.raises(TooManyDocuments):
            storage.put_in(work, ANA, md("c", name="c"), SETTINGS)
        with pytest.raises(DocumentOfFolder, match="projects/b comes from the watched folder"):
            storage.put_in(work, ANA, md("other", name="b"), SETTINGS)
        with pytest.raises(NotFound):
            storage.get_in(work, ContextOwner("other", "ana"), ContextKind.PROJECTS, "travel")
        assert len(storage.delete_of_user_in(work, "default", "ana")) == 2
        assert [one.user for one in storage.list_in(work, "default")] == [None]
